"""The parameters that tuning varies for each preset, and the range of each.

Another field of `TrainConfig` joins with a line in `SPACES`. The preset's own value must lie in the range, because the
first trial uses it. `cleaner` and `max_length` cannot join: the texts are cleaned and tokenised once for all trials.
"""

from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from training.config import TrainConfig

Space = dict[str, BaseDistribution]

SPACES: dict[str, Space] = {
    "guide": {
        "learning_rate": FloatDistribution(5e-6, 3e-4, log=True),
        "epochs": IntDistribution(2, 20),
        "train_batch_size": IntDistribution(8, 32, step=8),
        "dropout": FloatDistribution(0.0, 0.5, step=0.05),
        "step_gamma": FloatDistribution(0.5, 1.0, step=0.05),
    },
    "fast": {
        "learning_rate": FloatDistribution(1e-5, 1e-3, log=True),
        "epochs": IntDistribution(2, 12),
        "train_batch_size": IntDistribution(8, 32, step=8),
        "dropout": FloatDistribution(0.0, 0.5, step=0.05),
        "weight_decay": FloatDistribution(1e-3, 0.3, log=True),
        "warmup_ratio": FloatDistribution(0.0, 0.3, step=0.05),
        "pooling": CategoricalDistribution(("auto", "mean", "cls")),
    },
}


def space_of(preset: str, config: TrainConfig, fixed: set[str], auto_pooling: str) -> Space:
    """Return the space of a preset without the `fixed` parameters.

    `auto_pooling` is what `pooling: auto` means for the base model. Only one of two names for the same pooling is kept.
    """
    space = {name: values for name, values in SPACES[preset].items() if name not in fixed}
    pooling = space.get("pooling")
    if isinstance(pooling, CategoricalDistribution) and auto_pooling in pooling.choices:
        other_name = "auto" if config.pooling == auto_pooling else auto_pooling
        space["pooling"] = CategoricalDistribution([name for name in pooling.choices if name != other_name])
    return space


def values_of(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's parameters as they are used and shown: numbers with three significant digits."""
    return {name: float(f"{value:.3g}") if isinstance(value, float) else value for name, value in parameters.items()}
