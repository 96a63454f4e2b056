"""Labelled rows."""

from training.data.dataset import Rows


def rows_of(*labelled: tuple[str, str]) -> Rows:
    return Rows([text for _, text in labelled], [label for label, _ in labelled], list(range(2, 2 + len(labelled))))


def many(label: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    return [(label, f"{label}の文、その{i}") for i in range(start, start + count)]
