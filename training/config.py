"""The hyper-parameters of a job: immutable, validated on construction, stored as JSON with the job."""

from collections.abc import Iterable
from math import isfinite
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from db.errors import listed, plain, shown
from training.errors import BadConfig

# The losses that can train a task. Where there is one only, it is used whatever the preset.
LOSSES = {
    "single_label": ("cross_entropy", "bce"),
    "multi_label": ("bce",),
    "ordinal": ("cross_entropy",),
    "continuous": ("mse",),
}

# Fewer epochs do not train a classifier well.
FEWEST_EPOCHS = 2
# Few epochs of many rows need no dropout in the encoder and no small batches, and are faster without.
WITH_MANY_ROWS = {"encoder_dropout": 0.0, "train_batch_size": 32, "learning_rate": 2e-4}


class TrainConfig(BaseModel):
    """Hyper-parameters of a training run. The defaults are the guide's values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = "starter"
    base_revision: str | None = None
    # `ordinal`: each row has one of several ordered levels. `continuous`: each row has a number.
    task: Literal["single_label", "multi_label", "ordinal", "continuous"] = "single_label"
    # Label in the dataset -> label name. None keeps the labels of the dataset.
    labels: dict[str, str] | None = None
    # Names of an ordinal task, lowest first; by default in the order of `labels`. Stored separately because JSONB does
    # not keep the order of keys.
    levels: list[str] | None = Field(None, exclude_if=lambda levels: levels is None)
    # Label name -> -1..1, for `score_signed`. None recognises common names of positive, neutral and negative.
    # For a continuous task: two numbers -> -1..1; values between and beyond them are on the line through both points.
    polarity: dict[str, float] | None = None

    cleaner: Literal["1", "2", "neologdn"] = "2"
    head: Literal["guide", "linear"] = "guide"
    # `auto`: for a linear head the architecture's own classifier (`native`), else its pooler, else the masked mean.
    pooling: Literal["auto", "native", "pooler", "mean", "cls"] = "auto"
    loss: Literal["bce", "cross_entropy", "mse"] = "bce"
    dropout: float = Field(0.2, ge=0, lt=1, description="before the classifier")
    encoder_dropout: float | None = Field(
        None,
        ge=0,
        lt=1,
        exclude_if=lambda share: share is None,
        description="within the encoder; None keeps that of the base model",
    )
    max_length: int = Field(200, ge=8, le=8192, description="tokens, including special tokens")

    # `guide` reproduces the guide's split: not stratified, duplicates kept. The default is omitted in the stored JSON,
    # so that workers of an earlier release can run jobs and load models that do not use `guide`.
    split: Literal["stratified", "guide"] = Field("stratified", exclude_if=lambda split: split == "stratified")
    train_size: float = Field(0.8, gt=0, lt=1)
    valid_size: float = Field(
        0.5, gt=0, lt=1, description="share of the rows not used for training; the rest is for testing"
    )
    seed: int = Field(200, ge=0, lt=2**31)

    epochs: int = Field(20, ge=1, le=1000)
    # With few rows an epoch has few steps, so a number of epochs that suits one dataset does not suit another.
    row_passes: int | None = Field(
        None,
        ge=1,
        exclude_if=lambda passes: passes is None,
        description="train for as many epochs as give about this many rows, at least 2 and at most `epochs`",
    )
    faster_with_many_rows: bool = Field(
        False,
        exclude_if=lambda faster: not faster,
        description="where `row_passes` gives the least number of epochs: "
        + ", ".join(f"{name} {value}" for name, value in WITH_MANY_ROWS.items()),
    )
    add_sample: bool = Field(
        False,
        exclude_if=lambda added: not added,
        description="learn the sample tweets first, if there are few rows and the labels name sentiments",
    )
    sample_share: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,
        description="share of the weights that learned the sample in those that are kept",
    )
    train_batch_size: int = Field(16, ge=2, le=4096)
    valid_batch_size: int = Field(8, ge=1, le=4096)
    test_batch_size: int = Field(8, ge=1, le=4096)
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    learning_rate: float = Field(1e-5, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, lt=1)
    schedule: Literal["step", "linear", "cosine", "constant"] = "step"
    step_gamma: float = Field(
        0.75, gt=0, le=1, description="learning-rate factor of the step schedule, applied once an epoch"
    )
    warmup_ratio: float = Field(0.0, ge=0, lt=1, description="share of all steps; for the linear and cosine schedules")
    gradient_accumulation_steps: int = Field(1, ge=1, le=4096, description="batches per optimizer step")
    max_grad_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    class_weights: Literal["balanced"] | None = Field(None, description="applies to the training loss only")
    early_stopping_patience: int | None = Field(None, ge=1, description="epochs without a higher validation macro-F1")
    # Precision of computation; weights stay float32. `auto` uses bfloat16 where the hardware supports it.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    baseline: bool = True
    # The default is omitted in the stored JSON, as that of `split`.
    folds: int | None = Field(
        None, ge=2, le=20, exclude_if=lambda folds: folds is None, description="parts of a cross-validation"
    )

    @model_validator(mode="before")
    @classmethod
    def _order_levels(cls, given: Any) -> Any:
        labels = given.get("labels") if isinstance(given, dict) and given.get("task") == "ordinal" else None
        if isinstance(labels, dict) and all(isinstance(name, str) for name in labels.values()):
            return {"levels": list(dict.fromkeys(labels.values())), **given}
        return given

    # Stored tweets and a teacher. Like `split`, these are omitted in the stored JSON at their defaults.
    unlabelled: int = Field(
        0,
        ge=0,
        le=200_000,
        description="stored tweets to train on besides the labelled rows",
        exclude_if=lambda n: n == 0,
    )
    unlabelled_weight: float = Field(
        1.0,
        gt=0,
        le=1,
        description="weight of a stored tweet in the loss; without a teacher also the most that all of them together "
        "count, as a multiple of the labelled rows",
        exclude_if=lambda weight: weight == 1,
    )
    pseudo_threshold: float = Field(
        0.8,
        gt=0,
        lt=1,
        description="least probability of a predicted label that is trained on, without a teacher",
        exclude_if=lambda probability: probability == 0.8,
    )
    teacher: int | None = Field(
        None, ge=1, lt=2**31, description="model version to learn from", exclude_if=lambda model: model is None
    )
    teacher_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the teacher in the loss of a labelled row; the label has the rest",
        exclude_if=lambda share: share == 0.5,
    )
    soft_temperature: float = Field(
        2.0,
        gt=0,
        le=100,
        description="divisor of the logits of teacher and student in the loss",
        exclude_if=lambda temperature: temperature == 2,
    )

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        self._check_task()
        if self.unlabelled and self.teacher is None and self.task != "single_label":
            raise ValueError(
                f"unlabelled is {self.unlabelled}, but without a teacher only a single_label task can use stored "
                "tweets; leave it out, or name a teacher"
            )
        if self.folds is not None and self.split == "guide":
            raise ValueError(
                "folds cannot be used with split 'guide', which keeps copies of a text; leave out one of them"
            )
        if self.labels is not None and len(set(self.labels.values())) < 2:
            raise ValueError(f"labels name {shown(sorted(set(self.labels.values())))}; a classifier needs at least two")
        for label, value in (self.polarity or {}).items():
            if not -1 <= value <= 1:
                raise ValueError(f"polarity of {shown(label)} is {value}; it must lie between -1 and 1")
        _refuse_nul(self.base_model, self.base_revision or "", *(self.polarity or {}), *_texts(self.labels or {}))
        return self

    def _check_task(self) -> None:
        if self.loss not in LOSSES[self.task]:
            allowed = " or ".join(map(repr, LOSSES[self.task]))
            raise ValueError(f"loss {self.loss!r} cannot train the task {self.task}; use loss {allowed}")
        if self.levels is not None and self.task != "ordinal":
            raise ValueError(f"levels order the labels of an ordinal task, and the task is {self.task}; leave them out")
        if self.levels is not None and (
            self.labels is None or sorted(self.levels) != sorted(set(self.labels.values()))
        ):
            raise ValueError(f"levels name {listed(self.levels)}; they must be the names in labels, each once")
        if self.task != "continuous":
            return
        if self.folds is not None:
            raise ValueError("folds need labels, and a continuous task has numbers; leave out folds")
        if self.teacher is not None:
            raise ValueError("a teacher gives probabilities of labels, and a continuous task has none; leave it out")
        if self.labels is not None or self.class_weights is not None:
            raise ValueError("a continuous task has numbers instead of labels; leave out labels and class_weights")
        if self.polarity is not None and not _is_line(self.polarity):
            raise ValueError(
                f"polarity names {listed(self.polarity)}; for a continuous task give two numbers with different "
                "scores, as in -2=-1,2=1"
            )

    @property
    def one_label(self) -> bool:
        """Whether each row has exactly one label."""
        return self.task in ("single_label", "ordinal")

    def for_rows(self, rows: int) -> Self:
        """Return the configuration with the number of epochs, and the settings, that suit this many training rows."""
        if self.row_passes is None:
            return self
        passes = max(FEWEST_EPOCHS, round(self.row_passes / rows))
        settings = WITH_MANY_ROWS if self.faster_with_many_rows and passes == FEWEST_EPOCHS else {}
        known = {"epochs": min(self.epochs, passes), "row_passes": None, "faster_with_many_rows": False}
        return self.model_copy(update={**known, **settings})


class AdaptConfig(BaseModel):
    """The hyper-parameters of a job that adapts a base model to stored tweets."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = "starter"
    base_revision: str | None = None
    tweets: int = Field(100_000, ge=1, le=1_000_000, description="distinct texts at most, the newest first")
    cleaner: Literal["1", "2", "neologdn"] = "2"
    max_length: int = Field(128, ge=8, le=8192, description="tokens, including special tokens")
    mask_share: float = Field(0.15, gt=0, lt=1, description="share of the words that the model must predict")
    seed: int = Field(200, ge=0, lt=2**31)

    epochs: int = Field(3, ge=1, le=1000)
    train_batch_size: int = Field(32, ge=2, le=4096)
    valid_batch_size: int = Field(64, ge=1, le=4096)
    optimizer: Literal["adamw", "adafactor", "sgd"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0, le=1)
    weight_decay: float = Field(0.01, ge=0, lt=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of all steps; for the linear and cosine schedules")
    max_grad_norm: float | None = Field(1.0, gt=0, allow_inf_nan=False)
    # Precision of computation; weights stay float32. `auto` uses bfloat16 where the hardware supports it.
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @model_validator(mode="after")
    def _storable(self) -> Self:
        _refuse_nul(self.base_model, self.base_revision or "")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    # The guide's values, the defaults of `TrainConfig`.
    "guide": {},
    # For the starter model on a CPU: a small model needs a higher learning rate, a warm-up and few epochs.
    "fast": {
        "head": "linear",
        "loss": "cross_entropy",
        "dropout": 0.1,
        "epochs": 6,
        "row_passes": 15_000,
        "faster_with_many_rows": True,
        "add_sample": True,
        "sample_share": 0.5,
        "train_batch_size": 16,
        "valid_batch_size": 64,
        "test_batch_size": 64,
        "learning_rate": 1e-4,
        "schedule": "linear",
        "warmup_ratio": 0.1,
        "max_grad_norm": 1.0,
    },
}


def make_config(preset: str = "fast", /, **overrides: Any) -> TrainConfig:
    """Return a preset with overrides, validated. Raises `BadConfig` with the name, value and allowed values."""
    if not isinstance(preset, str) or preset not in PRESETS:  # the preset can come from a client's message
        raise BadConfig(f"there is no preset {shown(preset)}; use one of {', '.join(PRESETS)}")
    chosen = dict(PRESETS[preset])
    if "epochs" in overrides:
        chosen.pop("row_passes", None)
    if not WITH_MANY_ROWS.keys().isdisjoint(overrides):
        chosen.pop("faster_with_many_rows", None)
    losses = LOSSES.get(str(overrides.get("task")), ())
    if len(losses) == 1:
        chosen["loss"] = losses[0]
    try:
        return TrainConfig(**{**chosen, **overrides})
    except ValidationError as error:
        raise BadConfig("; ".join(explain(error))) from error


def make_adapt_config(**settings: Any) -> AdaptConfig:
    """Return the configuration, validated. Raises `BadConfig` like `make_config`."""
    try:
        return AdaptConfig(**settings)
    except ValidationError as error:
        raise BadConfig("; ".join(explain(error, AdaptConfig.model_fields))) from error


def _refuse_nul(*texts: str) -> None:
    for text in texts:
        if "\x00" in text:
            raise ValueError(f"{shown(text)} contains a NUL character, which databases cannot store; remove it")


def _is_line(polarity: dict[str, float]) -> bool:
    """Whether a polarity gives two different numbers different scores."""
    try:
        numbers = {float(text) for text in polarity}
    except ValueError:
        return False
    return len(numbers) == len(set(polarity.values())) == len(polarity) == 2 and all(map(isfinite, numbers))


def _texts(labels: dict[str, str]) -> list[str]:
    return [*labels, *labels.values()]


def explain(error: ValidationError, known: Iterable[str] = TrainConfig.model_fields) -> list[str]:
    """Return one sentence per validation error: name, value, allowed values. `known` are the names of all settings."""
    sentences = []
    for fault in error.errors():
        name = plain(".".join(str(part) for part in fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        if not name:
            sentences.append(message)
        elif fault["type"] == "extra_forbidden":
            sentences.append(f"{name} is not a setting; use one of {', '.join(known)}")
        else:
            sentences.append(f"{name} is {shown(fault['input'])}: {message[0].lower()}{message[1:]}")
    return sentences
