"""What scoring is compared with: other ways to the same labels, and other ways onto the broker.

Each peer does one round per call, so that a benchmark can take turns between them. Loading is never part of a round.
Returns figures and asserts nothing about them. Knows nothing of how a worker scores.
"""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from celery import Celery
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from training.model.artifact import load_artifact
from training.text.tokenizer import load_tokenizer
from worker.app import celery_config
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

Classify = Callable[[Sequence[str]], None]

CPU = torch.device("cpu")
MAX_LENGTH = 200
GUIDE_BATCH_SIZE = 8


# --- other ways to the same labels


@dataclass(frozen=True)
class PipelineSettings:
    dtype: torch.dtype = torch.float32
    batch_size: int = 32
    by_length: bool = False  # texts of about the same length make batches with little padding

    def __str__(self) -> str:
        order = ", sorted by length" if self.by_length else ""
        return f"{str(self.dtype).removeprefix('torch.')}, batches of {self.batch_size}{order}"


def pipeline(folder: Path, settings: PipelineSettings | None = None, device: torch.device = CPU) -> Classify:
    """The Hugging Face pipeline, by default on the CPU in float32 with batches of 32.

    `folder` is an artifact with a linear head on the pooler. Raises `ModelUnavailable` or OSError when it is none.
    """
    settings = settings or PipelineSettings()
    return _classify(_pipeline(folder, settings.dtype, device), settings)


def best_pipeline(folder: Path, few: Sequence[str], *, bf16: bool) -> tuple[PipelineSettings, Classify]:
    """The pipeline with the settings that classify a few texts fastest: sorted by length, in float32 or bfloat16 where
    the CPU has it, in batches of 32 or 64. Raises as `pipeline`."""
    best: tuple[float, PipelineSettings, Classify] | None = None
    for dtype in (torch.float32, torch.bfloat16) if bf16 else (torch.float32,):
        loaded = _pipeline(folder, dtype, CPU)
        _classify(loaded, PipelineSettings(dtype))(few[:32])
        for batch_size in (32, 64):
            settings = PipelineSettings(dtype, batch_size, by_length=True)
            classify = _classify(loaded, settings)
            began = time.perf_counter()
            classify(few)
            seconds = time.perf_counter() - began
            if best is None or seconds < best[0]:
                best = seconds, settings, classify
    assert best is not None
    return best[1], best[2]


def _pipeline(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    tokenizer = load_tokenizer(folder)
    return transformers.pipeline(
        "text-classification", model=str(folder), tokenizer=tokenizer, device=device, dtype=dtype
    )


def _classify(loaded: Any, settings: PipelineSettings) -> Classify:
    def classify_all(texts: Sequence[str]) -> None:
        inputs = sorted(texts, key=len) if settings.by_length else list(texts)
        loaded(inputs, batch_size=settings.batch_size, truncation=True, max_length=MAX_LENGTH)

    return classify_all


class GuideDataset(Dataset[dict[str, Tensor]]):
    """The guide's: a text is tokenised when its batch asks for it, alone, and padded to the maximum length.

    An item is `input_ids` and `attention_mask`, (200,) int64.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.texts = texts
        self.tokenizer = tokenizer

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        text = " ".join(self.texts[index].split())
        encoded = self.tokenizer(text, max_length=MAX_LENGTH, padding="max_length", truncation=True)
        return {name: torch.tensor(encoded[name], dtype=torch.long) for name in ("input_ids", "attention_mask")}


def guide(folder: Path, device: torch.device = CPU) -> Classify:
    """The guide's test loop: batches of 8, every text padded to 200 tokens, float32, no gradients.

    It runs the artifact's own model, and today's torch and transformers make its forward faster than the guide's were.
    Raises `BadArtifact` or `ModelUnavailable`.
    """
    artifact = load_artifact(folder)
    model = artifact.model.to(device)

    def label_all(texts: Sequence[str]) -> None:
        outputs: list[list[float]] = []
        with torch.no_grad():
            for batch in DataLoader(GuideDataset(texts, artifact.tokenizer), batch_size=GUIDE_BATCH_SIZE):
                logits = model(batch["input_ids"].to(device), batch["attention_mask"].to(device))  # (8, K)
                outputs.extend(torch.sigmoid(logits).cpu().numpy().tolist())
        np.array(outputs).argmax(axis=1)

    return label_all


# --- other ways onto the broker


def celery_delay(broker_url: str, texts: Sequence[str]) -> float:
    """Seconds to send one Celery message per tweet with `delay`, on a connection that is open already.

    `broker_url` is Celery's or redis-py's. The messages go to a queue of their own, which is deleted afterwards.
    Raises kombu's OperationalError when the broker does not answer.
    """
    queue = f"peer-{uuid.uuid4().hex}"
    app = Celery("peer", set_as_current=False)
    app.conf.update({**celery_config(broker_url), "task_default_queue": queue})

    @app.task(name="score", ignore_result=True)
    def score(tweet_id: str, text: str) -> None:
        """Never runs: no worker reads this queue."""

    try:
        score.delay("0", "")
        began = time.perf_counter()
        for number, text in enumerate(texts):
            score.delay(str(number), text)
        return time.perf_counter() - began
    finally:
        with app.connection_for_write() as connection:
            bound = app.amqp.queues[queue](connection.default_channel)
            bound.declare()  # a channel deletes only what it knows
            bound.purge()
            bound.delete()
        app.close()


def stream_publish(url: str, payloads: Sequence[bytes]) -> float:
    """Seconds to publish wire records to a fresh stream, on a connection that is open already. The stream is deleted.

    `url` is redis-py's. Raises `StreamError` when the server fails while publishing, redis-py's error before that.
    """
    with connect(url) as client:
        stream = Stream(client, f"peer-{uuid.uuid4().hex}", "peers")
        client.ping()
        try:
            began = time.perf_counter()
            stream.publish(payloads)
            return time.perf_counter() - began
        finally:
            client.delete(stream.key)
