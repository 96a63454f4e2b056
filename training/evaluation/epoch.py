"""The figures of one training epoch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Epoch:
    """Figures of one epoch, numbered from 1.

    Losses are means over rows. `learning_rate` is that of the last step, `seconds` the wall time. `kept` is True when
    the epoch's weights replaced those kept before; the last such epoch becomes the model. For `valid_accuracy` and
    `valid_f1_macro` see `epoch_quality`.
    """

    epoch: int
    train_loss: float
    learning_rate: float
    valid_loss: float
    valid_accuracy: float
    valid_f1_macro: float
    seconds: float
    kept: bool = True


def quality_names(task: str) -> tuple[str, str]:
    """Return the names of what `valid_accuracy` and `valid_f1_macro` hold."""
    return ("R2", "D2") if task == "continuous" else ("accuracy", "F1 macro")
