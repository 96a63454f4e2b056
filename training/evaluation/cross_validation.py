"""Mean and spread of the figures of a cross-validation. Imports nothing that loads slowly: commands print the line."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from training.evaluation.metrics import Figures

# In the order in which they are printed. Not every task has every one.
MEASURED = {
    "f1_macro": "macro-F1",
    "accuracy": "accuracy",
    "quadratic_kappa": "quadratic kappa",
    "mean_absolute_error": "mean absolute error",
}


def fold_figures(of_folds: Sequence["Figures"]) -> "Figures":
    """Return `cv_folds`, and the mean and the sample standard deviation over folds as `cv_NAME_mean`, `cv_NAME_sd`."""
    figures: Figures = {("cv_folds", ""): float(len(of_folds))}
    for name in MEASURED:
        if (name, "") not in of_folds[0]:
            continue
        values = [fold[name, ""] for fold in of_folds]
        figures |= {(f"cv_{name}_mean", ""): mean(values), (f"cv_{name}_sd", ""): stdev(values)}
    return figures


def describe(figures: "Figures") -> str | None:
    """Return the figures of a cross-validation in a line; None when there was none."""
    if ("cv_folds", "") not in figures:
        return None
    parts = [
        f"{title} {figures[f'cv_{name}_mean', '']:.2f} ± {figures[f'cv_{name}_sd', '']:.2f}"
        for name, title in MEASURED.items()
        if (f"cv_{name}_mean", "") in figures
    ]
    return f"{figures['cv_folds', '']:.0f}-fold cross-validation: {', '.join(parts)}"
