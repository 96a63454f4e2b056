"""Peers whose packages do not fit beside this project's: each runs in a process and an environment of its own.

A peer reads one JSON line: folder, a few texts, their token ids, threads, maximum length. It answers with the settings
it found best, and then each line of texts with the seconds it took to classify them. Its clock runs in its own process,
so nothing of what lies between the two is counted.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.peers import MAX_LENGTH
from training.text.tokenizer import TextEncoder, load_tokenizer

LOG_CHARS = 2_000
ENVIRONMENTS = Path("~/.cache/tweetscore").expanduser()
# The same words need the same MeCab and the same dictionary; the same products need the same torch.
SHARED_PACKAGES = ("fugashi", "ipadic")
TORCH = f"torch=={version('torch').partition('+')[0]}"

PRELUDE = f"""
import json, os, sys, time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the libraries print belongs to the log
sys.modules["openvino_telemetry"] = None  # or its vendor gets usage data


def answer(**values):
    print(json.dumps(values), file=answers, flush=True)


def check(tokenizer):
    if tokenizer(texts, truncation=True, max_length={MAX_LENGTH})["input_ids"] != asked["ids"]:
        sys.exit("this transformers gives the texts other token ids")


asked = json.loads(sys.stdin.readline())
folder, texts = asked["folder"], asked["texts"]
"""

# Infinity's own warm-up asks for a fast tokenizer, which Japanese BERT has not; one batch takes its place.
INFINITY_PEER = """
import asyncio

from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from transformers import AutoTokenizer


async def main():
    check(AutoTokenizer.from_pretrained(folder))
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=folder, engine="torch", device="cpu", dtype="float32", batch_size=32,
            bettertransformer=True, model_warmup=False, trust_remote_code=False,
        )
    )
    async with engine:
        await engine.classify(sentences=texts[:32])
        answer(settings="float32, batches of 32, BetterTransformer")
        for line in sys.stdin:
            asked_texts = json.loads(line)["texts"]
            began = time.perf_counter()
            await engine.classify(sentences=asked_texts)
            answer(seconds=time.perf_counter() - began)


asyncio.run(main())
"""

# Without a precision, OpenVINO computes in bfloat16 where the CPU has it. The hint THROUGHPUT gives each request a
# part of the cores, and a pipeline makes one request at a time.
OPTIMUM_PEER = """
from optimum.intel import OVModelForSequenceClassification, OVWeightQuantizationConfig
from transformers import AutoTokenizer, pipeline

tokenizer = AutoTokenizer.from_pretrained(folder)
check(tokenizer)
few = sorted(texts, key=len)
best = None
for name, options in (
    ("float", {"load_in_8bit": False}),
    ("int8 weights", {"quantization_config": OVWeightQuantizationConfig(bits=8)}),
):
    config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": asked["threads"]}
    model = OVModelForSequenceClassification.from_pretrained(folder, export=True, ov_config=config, **options)
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    for batch_size in (32, 64):
        settings = {"batch_size": batch_size, "truncation": True, "max_length": asked["max_length"]}
        classify(few, **settings)
        began = time.perf_counter()
        classify(few, **settings)
        seconds = time.perf_counter() - began
        if best is None or seconds < best[0]:
            best = seconds, f"{name}, batches of {batch_size}, sorted by length", classify, settings
_, found, classify, settings = best
answer(settings=found)
for line in sys.stdin:
    asked_texts = json.loads(line)["texts"]
    began = time.perf_counter()
    classify(sorted(asked_texts, key=len), **settings)
    answer(seconds=time.perf_counter() - began)
"""


class NotInstalled(RuntimeError):
    """A peer's environment could not be made, as without a package registry. Holds pip's last words."""


@dataclass(frozen=True)
class Isolated:
    """How to run a peer: its packages, those to remove again, and its program."""

    name: str
    pins: tuple[str, ...]
    program: str
    unwanted: tuple[str, ...] = ()


INFINITY = Isolated(
    "infinity",
    # optimum 2 and transformers 4.49 have no BetterTransformer, which is infinity's default.
    ("infinity-emb[torch]==0.0.78", TORCH, "transformers==4.48.3", "optimum==1.27.0"),
    INFINITY_PEER,
)
OPTIMUM = Isolated(
    "optimum",
    # It wants transformers before 5.6.
    ("optimum-intel==2.2.0", TORCH, "openvino==" + version("openvino")),
    OPTIMUM_PEER,
    # Its requirement torchvision comes built for CUDA, and transformers fails to import it beside a CPU build of torch.
    unwanted=("torchvision",),
)


class Peer:
    """A peer that is ready: `settings` are those it found best."""

    def __init__(self, process: "subprocess.Popen[str]", log: Path) -> None:
        self._process, self._log = process, log
        self.settings = ""

    def ask(self, **question: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            words = self._log.read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"the process of a peer ended: {words[-LOG_CHARS:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def seconds(self, texts: Sequence[str]) -> float:
        """The seconds of one round over the texts."""
        return float(self.ask(texts=list(texts))["seconds"])

    def close(self) -> None:
        self._process.kill()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


@contextmanager
def isolated(kind: Isolated, folder: Path, texts: Sequence[str], environments: Path = ENVIRONMENTS) -> Iterator[Peer]:
    """A peer over the artifact in `folder`, with as many threads as torch has here, tuned on a few texts.

    Its virtual environment is made on first use, which takes minutes and a registry, and used again afterwards. Raises
    `NotInstalled` when it cannot be made, and RuntimeError with the peer's last words when the process ends, also when
    its tokenizer gives other token ids than ours.
    """
    python = _python(kind, environments / kind.name)
    threads = torch.get_num_threads()
    variables = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        model, log = Path(scratch) / "model", Path(scratch) / "log"
        _copy(folder, model)
        with (
            log.open("wb") as words,
            subprocess.Popen(
                [python, "-I", "-c", PRELUDE + kind.program],  # -I: it sees neither this project nor this environment
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env={**os.environ, **variables},
            ) as process,
        ):
            peer = Peer(process, log)
            try:
                ids = TextEncoder(load_tokenizer(folder))(list(texts), MAX_LENGTH)
                ready = peer.ask(folder=str(model), texts=list(texts), ids=ids, threads=threads, max_length=MAX_LENGTH)
                peer.settings = ready["settings"]
                yield peer
            finally:
                peer.close()


def _python(kind: Isolated, environment: Path) -> Path:
    """The interpreter of a peer's environment, which is made, or finished, unless it has the wanted packages."""
    python, finished = environment / "bin" / "python", environment / "requirements.txt"
    wanted = [*kind.pins, *(f"{name}=={version(name)}" for name in SHARED_PACKAGES)]
    if finished.is_file() and finished.read_text(encoding="utf-8").splitlines() == wanted:
        return python
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python), "-m", "pip"]
    for arguments in (["install", "--quiet", *wanted], *(["uninstall", "-y", name] for name in kind.unwanted)):
        done = subprocess.run([*pip, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise NotInstalled(f"pip {' '.join(arguments)}: {done.stderr.strip()[-LOG_CHARS:]}")
    finished.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    return python


def _copy(folder: Path, copy: Path) -> None:
    """The artifact with two files changed: these libraries tell a classifier by its architecture, and have no maximum
    length but the tokenizer's."""
    changes: dict[str, dict[str, Any]] = {
        "config.json": {"architectures": ["BertForSequenceClassification"]},
        "tokenizer_config.json": {"model_max_length": MAX_LENGTH},
    }
    copy.mkdir()
    for path in folder.iterdir():
        if path.name in changes:
            written = json.loads(path.read_text(encoding="utf-8")) | changes[path.name]
            (copy / path.name).write_text(json.dumps(written, ensure_ascii=False), encoding="utf-8")
        else:
            (copy / path.name).symlink_to(path.resolve())
