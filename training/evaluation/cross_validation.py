"""Mean and spread of the figures of a cross-validation. Imports nothing that loads slowly: commands print the line."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.evaluation.metrics import Figures

MEASURED = ("accuracy", "f1_macro")


def fold_figures(of_folds: Sequence["Figures"]) -> "Figures":
    """Return `cv_folds`, and the mean and the sample standard deviation over folds as `cv_NAME_mean`, `cv_NAME_sd`."""
    figures: Figures = {("cv_folds", ""): float(len(of_folds))}
    for name in MEASURED:
        values = [fold[name, ""] for fold in of_folds]
        figures |= {(f"cv_{name}_mean", ""): mean(values), (f"cv_{name}_sd", ""): stdev(values)}
    return figures


def describe(figures: "Figures") -> str | None:
    """Return the figures of a cross-validation in a line; None when there was none."""
    if ("cv_folds", "") not in figures:
        return None
    f1, accuracy = (
        f"{figures[f'cv_{name}_mean', '']:.2f} ± {figures[f'cv_{name}_sd', '']:.2f}"
        for name in ("f1_macro", "accuracy")
    )
    return f"{figures['cv_folds', '']:.0f}-fold cross-validation: macro-F1 {f1}, accuracy {accuracy}"
