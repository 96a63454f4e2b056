"""TensorBoard: a run's scalars, figures, hyper-parameters and graph, in one folder."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch.utils.tensorboard import SummaryWriter

from training import plots
from training.batches import pad
from training.checkpoint import Epoch
from training.config import TrainConfig
from training.dataset import Split
from training.decide import Floats
from training.model import Classifier

log = logging.getLogger(__name__)


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

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        self._writer.add_scalar("training loss", loss, step)
        self._writer.add_scalar("learning rate", learning_rate, step)

    def epoch(self, step: int, epoch: Epoch, valid: Split, said: Floats, labels: list[str], task: str) -> None:
        """An epoch's figures, and pictures of what was `said` (N, K) of the validation rows."""
        figures = {
            "epoch loss": epoch.train_loss,
            "validation loss": epoch.valid_loss,
            "validation accuracy": epoch.valid_accuracy,
            "validation f1 macro": epoch.valid_f1_macro,
        }
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        pictures = {
            "predictions vs. actuals": plots.predictions(valid.texts, valid.targets, said, labels, task),
            "confusion": plots.confusion(valid.targets, said, labels, task),
        }
        for name, figure in pictures.items():
            self._writer.add_figure(name, figure, global_step=step)

    def hparams(self, config: TrainConfig, kept: Mapping[str, float]) -> None:
        """The run's line in the table that compares runs."""
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.model_dump(mode="json").items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._writer.add_hparams(values, {f"kept/{name}": value for name, value in kept.items()}, run_name=".")

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
