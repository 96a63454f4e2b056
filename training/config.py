"""The hyper-parameters of a job: immutable, validated on construction, stored as JSON with the job."""

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from db.errors import plain, shown
from training.errors import BadConfig


class TrainConfig(BaseModel):
    """Hyper-parameters of a training run. The defaults are the guide's values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = "starter"
    base_revision: str | None = None
    task: Literal["single_label", "multi_label"] = "single_label"
    # Label in the dataset -> label name. None keeps the labels of the dataset.
    labels: dict[str, str] | None = None
    # Label name -> -1..1, for `score_signed`. None recognises common names of positive, neutral and negative.
    polarity: dict[str, float] | None = None

    cleaner: Literal["1", "2", "neologdn"] = "2"
    head: Literal["guide", "linear"] = "guide"
    # `auto`: for a linear head the architecture's own classifier (`native`), else its pooler, else the masked mean.
    pooling: Literal["auto", "native", "pooler", "mean", "cls"] = "auto"
    loss: Literal["bce", "cross_entropy"] = "bce"
    dropout: float = Field(0.2, ge=0, lt=1)
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
        if self.task == "multi_label" and self.loss != "bce":
            raise ValueError(f"loss {self.loss!r} cannot train a multi-label task; use loss 'bce'")
        if self.unlabelled and self.teacher is None and self.task != "single_label":
            raise ValueError(
                f"unlabelled is {self.unlabelled}, but without a teacher only a single_label task can use stored "
                "tweets; leave it out, or name a teacher"
            )
        if self.labels is not None and len(set(self.labels.values())) < 2:
            raise ValueError(f"labels name {shown(sorted(set(self.labels.values())))}; a classifier needs at least two")
        for label, value in (self.polarity or {}).items():
            if not -1 <= value <= 1:
                raise ValueError(f"polarity of {shown(label)} is {value}; it must lie between -1 and 1")
        for text in (self.base_model, self.base_revision or "", *(self.polarity or {}), *_texts(self.labels or {})):
            if "\x00" in text:
                raise ValueError(f"{shown(text)} contains a NUL character, which databases cannot store; remove it")
        return self


PRESETS: dict[str, dict[str, Any]] = {
    # The guide's values, the defaults of `TrainConfig`.
    "guide": {},
    # For the starter model on a CPU: a small model needs a higher learning rate, a warm-up and few epochs.
    "fast": {
        "head": "linear",
        "loss": "cross_entropy",
        "dropout": 0.1,
        "epochs": 4,
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
    if overrides.get("task") == "multi_label":
        chosen["loss"] = "bce"  # the only loss for multi-label tasks
    try:
        return TrainConfig(**{**chosen, **overrides})
    except ValidationError as error:
        raise BadConfig("; ".join(explain(error))) from error


def _texts(labels: dict[str, str]) -> list[str]:
    return [*labels, *labels.values()]


def explain(error: ValidationError) -> list[str]:
    """Return one sentence per validation error: name, value, allowed values."""
    sentences = []
    for fault in error.errors():
        name = plain(".".join(str(part) for part in fault["loc"]))
        message = fault["msg"].removeprefix("Value error, ")
        if not name:
            sentences.append(message)
        elif fault["type"] == "extra_forbidden":
            sentences.append(f"{name} is not a setting; use one of {', '.join(TrainConfig.model_fields)}")
        else:
            sentences.append(f"{name} is {shown(fault['input'])}: {message[0].lower()}{message[1:]}")
    return sentences
