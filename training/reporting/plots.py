"""Matplotlib figures of a training run, for TensorBoard and the model card."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib_fontja  # noqa: F401 - sets a font with Japanese glyphs
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from training.data.numbers import number_text
from training.evaluation.calibration import reliability_bins
from training.evaluation.decisions import Floats, choose, confidence, label_text
from training.evaluation.epoch import Epoch

mpl.use("Agg")

Values = NDArray[np.float64]

ROWS_SHOWN = 8
TEXT_SHOWN = 40
LABEL_SHOWN = 12
# With more labels, the counts in the cells of a confusion matrix would overlap.
MAX_LABELS_WITH_COUNTS = 16
DECISIONS = ("true positive", "false negative", "false positive", "true negative")


def predictions(texts: Sequence[str], targets: Floats, probabilities: Floats, labels: list[str], task: str) -> Figure:
    """Show the first rows: text, predicted label with its probability, actual label; green if correct, else red."""
    chosen = choose(probabilities[:ROWS_SHOWN], task)
    sure = confidence(probabilities[:ROWS_SHOWN], chosen, task)
    captions = []
    for of_row, target, probability in zip(chosen, targets, sure, strict=False):
        predicted, actual = label_text(of_row, labels) or "-", label_text(target, labels) or "-"
        color = "green" if predicted == actual else "red"
        captions.append((f"{predicted}, {100 * float(probability):.1f}%  (label: {actual})", color))
    return _captioned(texts, captions)


def predicted_values(texts: Sequence[str], actual: Values, predicted: Values) -> Figure:
    """Show the first rows of a continuous task: text, predicted value, actual value."""
    pairs = zip(predicted[:ROWS_SHOWN], actual, strict=False)
    return _captioned(texts, [(f"{number_text(said)}  (target: {number_text(true)})", "black") for said, true in pairs])


def _captioned(texts: Sequence[str], captions: Sequence[tuple[str, str]]) -> Figure:
    """Show texts, each above its caption (text, color)."""
    figure = Figure(figsize=(8, 0.62 * len(captions) + 0.2))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.98)
    for i, (caption, color) in enumerate(captions):
        axes = figure.add_subplot(len(captions), 1, i + 1, xticks=[], yticks=[])
        axes.set_axis_off()
        axes.text(0, 0.62, drawable(texts[i], TEXT_SHOWN), va="center", fontsize=11)
        axes.text(0, 0.12, drawable(caption, 2 * TEXT_SHOWN), va="center", color=color, fontsize=10)
    return figure


def epochs(history: Sequence[Epoch], names: tuple[str, str] = ("accuracy", "F1 macro")) -> Figure:
    """Plot losses and the figures of the validation rows, called `names`, per epoch; mark the epoch that is kept."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in history]
    kept = [epoch.epoch for epoch in history if epoch.kept][-1]
    loss.plot(numbers, [epoch.train_loss for epoch in history], marker="o", label="training")
    loss.plot(numbers, [epoch.valid_loss for epoch in history], marker="o", label="validation")
    loss.set_title("loss")
    quality.plot(numbers, [epoch.valid_accuracy for epoch in history], marker="o", label=names[0])
    quality.plot(numbers, [epoch.valid_f1_macro for epoch in history], marker="o", label=names[1])
    quality.set_title("validation rows")
    for axes in (loss, quality):
        axes.axvline(kept, color="gray", linestyle=":", label="kept")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def confusion(targets: Floats, probabilities: Floats, labels: list[str], task: str) -> Figure:
    """Plot the confusion matrix: rows are actual labels, columns predicted ones, colours shares of the row.

    For multi_label, the columns are true positives, false negatives, false positives and true negatives of each label.
    """
    chosen, truth = choose(probabilities, task), targets.astype(np.int64)
    if task == "multi_label":
        pairs = ((truth, chosen), (truth, 1 - chosen), (1 - truth, chosen), (1 - truth, 1 - chosen))
        counts = np.stack([(a * b).sum(axis=0) for a, b in pairs], axis=1)  # (K, 4)
        columns: Sequence[str] = DECISIONS
    else:
        counts, columns = truth.T @ chosen, labels  # (K, K)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    height = min(12.0, 2.0 + 0.55 * len(labels))
    figure = Figure(figsize=(min(13.0, 3.6 + 0.75 * len(columns)), height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    figure.colorbar(image, label="share of the actual label")
    axes.set_xticks(range(len(columns)), [drawable(name, LABEL_SHOWN) for name in columns], rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), [drawable(name, LABEL_SHOWN) for name in labels])
    axes.set_ylabel("actual" if task != "multi_label" else "label")
    axes.set_xlabel("predicted" if task != "multi_label" else "decision")
    if len(labels) <= MAX_LABELS_WITH_COUNTS:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    return figure


def reliability_diagram(targets: Floats, raw: Floats, calibrated: Floats, task: str) -> Figure:
    """Plot accuracy against confidence in bins, before and after temperature scaling, and the rows per bin."""
    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    axes, spread = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    axes.plot((0, 1), (0, 1), color="gray", linestyle=":", label="perfect")
    for name, probabilities, color in (
        ("before scaling", raw, "tab:orange"),
        ("after scaling", calibrated, "tab:blue"),
    ):
        bins = reliability_bins(targets, probabilities, task)
        confidences = [mean for _, mean, _ in bins]
        axes.plot(confidences, [accuracy for _, _, accuracy in bins], "o-", color=color, label=name)
        if probabilities is calibrated:
            spread.bar(confidences, [rows for rows, _, _ in bins], width=0.04, color=color)
    axes.set_ylabel("accuracy")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    spread.set_ylabel("count")
    spread.set_xlabel("confidence")
    return figure


def confidence_histogram(targets: Floats, probabilities: Floats, task: str) -> Figure:
    """Plot a histogram of the confidence of correct and incorrect predictions."""
    chosen = choose(probabilities, task)
    confidences = confidence(probabilities, chosen, task)
    correct = (chosen == targets.astype(np.int64)).all(axis=1)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bins: Any = np.linspace(0, 1, 21)
    axes.hist([confidences[correct], confidences[~correct]], bins=bins, stacked=True, color=["tab:green", "tab:red"])
    axes.legend([f"correct ({int(correct.sum()):,})", f"incorrect ({int((~correct).sum()):,})"], loc="upper left")
    axes.set_xlim(0, 1)
    axes.set_xlabel("confidence")
    axes.set_ylabel("test rows")
    return figure


def values(actual: Values, predicted: Values) -> Figure:
    """Plot predicted against actual values."""
    figure = Figure(figsize=(5.2, 5.2), layout="constrained")
    axes = figure.add_subplot()
    ends = [min(actual.min(), predicted.min()), max(actual.max(), predicted.max())]
    axes.plot(ends, ends, color="gray", linestyle=":", label="perfect")
    axes.scatter(actual, predicted, s=12, alpha=0.5)
    axes.set_xlabel("actual")
    axes.set_ylabel("predicted")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    return figure


def error_histogram(actual: Values, predicted: Values) -> Figure:
    """Plot a histogram of the errors, predicted minus actual."""
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(predicted - actual, bins=21, color="tab:blue")
    axes.axvline(0, color="gray", linestyle=":")
    axes.set_xlabel("predicted minus actual")
    axes.set_ylabel("test rows")
    return figure


def drawable(text: str, longest: int) -> str:
    """Return text that matplotlib can draw: without emoji, which the font lacks, and with `$` escaped (mathtext)."""
    text = "".join(char for char in text if unicodedata.category(char) not in ("So", "Cf", "Cn", "Mn", "Cc"))
    text = text if len(text) <= longest else text[:longest] + "…"
    return text.replace("$", r"\$")
