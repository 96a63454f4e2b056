"""Write a training run to TensorBoard: scalars, figures, hyper-parameters and the model graph."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from training.config import TrainConfig
from training.data.dataset import Split
from training.data.numbers import TargetScale
from training.evaluation.decisions import Floats
from training.evaluation.epoch import Epoch, quality_names
from training.model.batching import pad
from training.model.classifier import Classifier

log = logging.getLogger(__name__)


class TensorBoardWriter:
    """The log folder of one run. A resumed run writes to the same folder; from `first_step` it replaces old steps.

    Without a folder nothing is drawn or written, and the packages for it are not loaded.
    """

    def __init__(self, folder: Path | None, first_step: int = 0) -> None:
        self._writer: Any = None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=first_step or None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, step: int, loss: float, learning_rate: float) -> None:
        """Write the loss and the learning rate of an optimizer step."""
        if self._writer is None:
            return
        self._writer.add_scalar("training loss", loss, step)
        self._writer.add_scalar("learning rate", learning_rate, step)

    def epoch(
        self,
        step: int,
        epoch: Epoch,
        valid: Split,
        probabilities: Floats,
        labels: list[str],
        config: TrainConfig,
        scale: TargetScale | None = None,
    ) -> None:
        """Write an epoch's figures, and plots of the predicted `probabilities` (N, K) of the validation rows."""
        if self._writer is None:
            return
        from training.reporting import plots

        accuracy, f1_macro = quality_names(config.task)
        figures = {
            "epoch loss": epoch.train_loss,
            "validation loss": epoch.valid_loss,
            f"validation {accuracy.lower()}": epoch.valid_accuracy,
            f"validation {f1_macro.lower()}": epoch.valid_f1_macro,
        }
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        if scale is None:
            drawn = {
                "predictions vs. actuals": plots.predictions(
                    valid.texts, valid.targets, probabilities, labels, config.task
                ),
                "confusion": plots.confusion(valid.targets, probabilities, labels, config.task),
            }
        else:
            actual, predicted = (scale.values(outputs)[:, 0] for outputs in (valid.targets, probabilities))
            drawn = {
                "predictions vs. actuals": plots.predicted_values(valid.texts, actual, predicted),
                "values": plots.values(actual, predicted),
            }
        for name, figure in drawn.items():
            self._writer.add_figure(name, figure, global_step=step)

    def hparams(self, config: TrainConfig, kept: Mapping[str, float]) -> None:
        """Write the hyper-parameters and the figures of the kept epoch, for the table that compares runs."""
        if self._writer is None:
            return
        values = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in config.model_dump(mode="json").items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._writer.add_hparams(values, {f"kept/{name}": value for name, value in kept.items()}, run_name=".")

    def graph(self, model: Classifier, row: Sequence[int], pad_id: int, device: torch.device) -> None:
        """Write the model graph, traced with one row of token ids. No graph is written if tracing fails."""
        if self._writer is None:
            return
        ids, mask = pad([row, row], pad_id)
        try:
            with warnings.catch_warnings():
                # Tracing warns about every Python branch in the encoder, which does not affect the graph.
                warnings.simplefilter("ignore")
                self._writer.add_graph(model, (ids.to(device), mask.to(device)))
        except RuntimeError as error:
            # Some encoders cannot be traced. The graph is optional, so training continues.
            log.warning("the model graph could not be written to TensorBoard: %s", str(error).splitlines()[0])
