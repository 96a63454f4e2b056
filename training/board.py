"""TensorBoard: the guide's loss scalar, predictions-vs-actuals figure and graph. Knows figures, not how they came."""

import logging
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import matplotlib as mpl
import matplotlib_fontja  # noqa: F401 - draws Japanese labels as glyphs
import numpy as np
import torch
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from training.batches import pad
from training.evaluate import choose, label_text
from training.model import Classifier

log = logging.getLogger(__name__)
mpl.use("Agg")

ROWS_SHOWN = 8
TEXT_SHOWN = 40


class Board:
    """One run's log folder. A resumed run goes on in the same folder; steps it repeats replace the earlier ones."""

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def step(self, step: int, loss: float) -> None:
        self._writer.add_scalar("training loss", loss, step)

    def epoch(self, step: int, figures: dict[str, float], figure: Figure) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.add_figure("predictions vs. actuals", figure, global_step=step)

    def graph(self, model: Classifier, row: Sequence[int], pad_id: int, device: torch.device) -> None:
        ids, mask = pad([row, row], pad_id)
        try:
            with warnings.catch_warnings():
                # Tracing warns of every Python branch in the encoder; the picture is none the worse.
                warnings.simplefilter("ignore")
                self._writer.add_graph(model, (ids.to(device), mask.to(device)))
        except RuntimeError as error:
            # Tracing fails on some encoders; the run is no worse for lacking a picture of itself.
            log.warning("the graph could not be drawn: %s", str(error).splitlines()[0])


def predictions_figure(
    texts: Sequence[str], targets: np.ndarray, probabilities: np.ndarray, labels: list[str], task: str
) -> Figure:
    """The first validation rows: text, predicted label with its percentage, actual label; green when right, or red."""
    shown = min(ROWS_SHOWN, len(texts))
    chosen = choose(probabilities[:shown], task)
    figure = Figure(figsize=(8, 0.62 * shown + 0.2))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.98)
    for i in range(shown):
        axes = figure.add_subplot(shown, 1, i + 1, xticks=[], yticks=[])
        axes.set_axis_off()
        predicted, actual = label_text(chosen[i], labels) or "-", label_text(targets[i], labels) or "-"
        # The Japanese font has no emoji: they would be drawn as boxes.
        text = "".join(char for char in texts[i] if unicodedata.category(char) not in ("So", "Cf", "Cn", "Mn"))
        text = text if len(text) <= TEXT_SHOWN else text[:TEXT_SHOWN] + "…"
        color = "green" if predicted == actual else "red"
        percent = 100 * float(probabilities[i].max())
        axes.text(0, 0.62, text.replace("$", r"\$"), va="center", fontsize=11)
        axes.text(0, 0.12, f"{predicted}, {percent:.1f}%  (label: {actual})", va="center", color=color, fontsize=10)
    return figure
