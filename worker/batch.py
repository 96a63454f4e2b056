"""Pure: from a window's token counts to batches for the device. Knows numbers only."""

from collections.abc import Sequence


def plan_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Indices in batches of like length, longest first, each with longest x count <= `token_budget`.

    Sorting keeps padding low; the longest batch comes first, so that a device that is too small for it shows at once.
    A row longer than the budget makes a batch of its own.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
