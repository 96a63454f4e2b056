"""Pictures of a training run, for TensorBoard and for the model card. Knows figures, not how they came."""

import unicodedata
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import matplotlib_fontja  # noqa: F401 - draws Japanese labels as glyphs
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from training.calibrate import reliability
from training.checkpoint import Epoch
from training.decide import Floats, certainty, choose, label_text

mpl.use("Agg")

ROWS_SHOWN = 8
TEXT_SHOWN = 40
LABEL_SHOWN = 12
# With more labels the numbers in a confusion matrix would overlap.
MOST_NUMBERED = 16
DECISIONS = ("right yes", "missed", "wrong yes", "right no")


def predictions(texts: Sequence[str], targets: Floats, probabilities: Floats, labels: list[str], task: str) -> Figure:
    """The first rows: text, predicted label with its percentage, actual label; green when right, or red."""
    shown = min(ROWS_SHOWN, len(texts))
    chosen = choose(probabilities[:shown], task)
    figure = Figure(figsize=(8, 0.62 * shown + 0.2))
    figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02, top=0.98)
    for i in range(shown):
        axes = figure.add_subplot(shown, 1, i + 1, xticks=[], yticks=[])
        axes.set_axis_off()
        predicted, actual = label_text(chosen[i], labels) or "-", label_text(targets[i], labels) or "-"
        color = "green" if predicted == actual else "red"
        said = f"{predicted}, {100 * float(probabilities[i].max()):.1f}%  (label: {actual})"
        axes.text(0, 0.62, drawable(texts[i], TEXT_SHOWN), va="center", fontsize=11)
        axes.text(0, 0.12, drawable(said, 2 * TEXT_SHOWN), va="center", color=color, fontsize=10)
    return figure


def epochs(history: Sequence[Epoch]) -> Figure:
    """Losses, and validation accuracy and macro-F1, by epoch; the epoch that is kept is marked."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    numbers = [epoch.epoch for epoch in history]
    kept = [epoch.epoch for epoch in history if epoch.kept][-1]
    loss.plot(numbers, [epoch.train_loss for epoch in history], marker="o", label="training")
    loss.plot(numbers, [epoch.valid_loss for epoch in history], marker="o", label="validation")
    loss.set_title("loss")
    quality.plot(numbers, [epoch.valid_accuracy for epoch in history], marker="o", label="accuracy")
    quality.plot(numbers, [epoch.valid_f1_macro for epoch in history], marker="o", label="F1 macro")
    quality.set_title("validation rows")
    for axes in (loss, quality):
        axes.axvline(kept, color="gray", linestyle=":", label="kept")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def confusion(targets: Floats, probabilities: Floats, labels: list[str], task: str) -> Figure:
    """Counts by actual (rows) and predicted label; colours are shares of the actual label's rows.

    Where a row may have several labels: how often each was rightly given, missed, wrongly given, rightly left out.
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
    if len(labels) <= MOST_NUMBERED:
        for (i, j), count in np.ndenumerate(counts):
            axes.text(j, i, f"{count:,}", ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    return figure


def reliability_diagram(targets: Floats, raw: Floats, calibrated: Floats, task: str) -> Figure:
    """Share right against confidence in bins, before and after temperature scaling, and how the rows are spread."""
    figure = Figure(figsize=(5.2, 5.6), layout="constrained")
    axes, spread = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    axes.plot((0, 1), (0, 1), color="gray", linestyle=":", label="perfect")
    for name, probabilities, color in (
        ("before scaling", raw, "tab:orange"),
        ("after scaling", calibrated, "tab:blue"),
    ):
        found = reliability(targets, probabilities, task)
        axes.plot([sure for _, sure, _ in found], [right for _, _, right in found], "o-", color=color, label=name)
        if probabilities is calibrated:
            spread.bar([sure for _, sure, _ in found], [rows for rows, _, _ in found], width=0.04, color=color)
    axes.set_ylabel("share that was right")
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    spread.set_ylabel("count")
    spread.set_xlabel("confidence")
    return figure


def scores(targets: Floats, probabilities: Floats, task: str) -> Figure:
    """How sure the model was of its decisions, right ones and wrong ones."""
    chosen = choose(probabilities, task)
    sure = certainty(probabilities, chosen, task)
    right = (chosen == targets.astype(np.int64)).all(axis=1)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.add_subplot()
    bins: Any = np.linspace(0, 1, 21)
    axes.hist([sure[right], sure[~right]], bins=bins, stacked=True, color=["tab:green", "tab:red"])
    axes.legend([f"right ({int(right.sum()):,})", f"wrong ({int((~right).sum()):,})"], loc="upper left")
    axes.set_xlim(0, 1)
    axes.set_xlabel("probability of the prediction")
    axes.set_ylabel("test rows")
    return figure


def drawable(text: str, longest: int) -> str:
    """Text as matplotlib draws it: the Japanese font has no emoji, and a dollar sign would begin a formula."""
    text = "".join(char for char in text if unicodedata.category(char) not in ("So", "Cf", "Cn", "Mn", "Cc"))
    text = text if len(text) <= longest else text[:longest] + "…"
    return text.replace("$", r"\$")
