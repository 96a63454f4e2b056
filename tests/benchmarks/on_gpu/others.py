"""Other ways on the same card: the pipeline of transformers, the guide's loop, and training by the Trainer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from tests.benchmarks import peers
from tests.benchmarks.models import BASE, SMALL, VOCABULARY
from tests.benchmarks.on_gpu.card import release
from tests.benchmarks.on_gpu.material import Bench
from tests.benchmarks.on_gpu.parts import Record, middle, timed
from training.config import make_config
from training.model.base_model import STARTER_FOLDER
from training.text.tokenizer import load_tokenizer

PIPELINE_BATCHES = (32, 256)
TRAINING_ROUNDS, WARM_UP_TEXTS = 2, 96


def pipelines(bench: Bench, record: Record) -> None:
    """The pipeline in half precision, sorted by length, and the guide's loop; tokenising is part of both."""
    table = record.table("Other ways, base", "", "tweets/s", "tweets a round", "rounds")
    half = torch.float16 if bench.device.type == "cuda" else torch.float32
    ways: dict[str, tuple[Callable[[], peers.Classify], int]] = {}
    for size in PIPELINE_BATCHES:
        settings = peers.PipelineSettings(half, size, by_length=True)
        make = partial(peers.pipeline, bench.base.folder, settings, bench.device)
        ways[f"pipeline, {settings}"] = make, bench.size.pipeline_texts
    ways["the guide's loop, float32, batches of 8, padded to 200"] = (
        partial(peers.guide, bench.base.folder, bench.device), bench.size.guide_texts,
    )  # fmt: skip
    for name, (prepare, count) in ways.items():
        try:
            classify, texts = prepare(), bench.many_texts(count)
            classify(texts[: max(8, count // 8)])
            seconds = timed(partial(classify, texts), bench.size.rounds, lambda: record.left)
        except Exception as error:
            record.failed(name, error)
            continue
        bench.peers[name] = count / middle(seconds)
        table.add(name, bench.peers[name], count, len(seconds))
        record.data[name] = {"tweets_per_second": bench.peers[name], "seconds": seconds, "texts": count}


def training(bench: Bench, record: Record) -> None:
    """One epoch at base size by `fit` and by the Trainer, as it is and with bfloat16, in turns.

    Each first trains on a few texts: libraries load what they need when it is needed first.
    """
    from tests.benchmarks import trainers  # needs more packages than scoring

    folder = _encoder(bench.scratch / "encoder", bench.size.small)
    texts = [" ".join(text.split()) for text in bench.many_texts(bench.size.training_texts)]
    config = make_config("fast", epochs=1, train_batch_size=32)
    on_cpu = bench.device.type == "cpu"
    ways: dict[str, Callable[[list[str]], float]] = {
        "ours": lambda some: trainers.ours(folder, some, config, bench.device, board=False),
        "Trainer": lambda some: trainers.trainer(folder, some, config, use_cpu=on_cpu),
        "Trainer, bf16": lambda some: trainers.trainer(folder, some, config, use_cpu=on_cpu, bf16=True),
    }
    speeds: dict[str, list[float]] = {}
    peaks: dict[str, float] = {}
    for _ in range(TRAINING_ROUNDS):
        for name, way in list(ways.items()):
            if record.left <= 0:
                record.note(f"no time for another round of {name}")
                continue
            try:
                if name not in speeds:
                    way(texts[:WARM_UP_TEXTS])
                release(bench.device)
                if not on_cpu:
                    torch.cuda.reset_peak_memory_stats(bench.device)
                speeds.setdefault(name, []).append(way(texts))
                peaks[name] = torch.cuda.max_memory_allocated(bench.device) if not on_cpu else 0
            except Exception as error:
                del ways[name]
                record.failed(name, error)
    table = record.table("Training, base, batches of 32", "", "samples/s", "ours over it", "peak MB", "rounds")
    for name, found in speeds.items():
        if found:
            ratio = middle(speeds["ours"]) / middle(found) if speeds.get("ours") else None
            table.add(name, middle(found), ratio, peaks[name] / 1e6 or None, len(found))
            record.data[name] = {"samples_per_second": found, "peak_bytes": peaks[name]}


def _encoder(folder: Path, small: bool) -> Path:
    """A BERT of base size with random weights and the starter's tokenizer."""
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=VOCABULARY, **(SMALL if small else BASE))).save_pretrained(folder)
    load_tokenizer(STARTER_FOLDER).save_pretrained(str(folder))
    return folder
