"""What scoring is compared with: other ways to the same labels, other ways onto the broker, and what the CPU can do.

Each peer does one round per call, so that a benchmark can take turns between them. Loading is never part of a round.
Returns figures and asserts nothing about them. Knows nothing of how a worker scores.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import torch
import transformers
from celery import Celery
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from training.model.artifact import load_artifact
from training.text.tokenizer import TextEncoder, load_tokenizer
from worker.app import celery_config
from worker.stream.redis_client import connect
from worker.stream.stream import Stream

MAX_LENGTH = 200
PIPELINE_BATCH_SIZE = 32
GUIDE_BATCH_SIZE = 8
LOG_CHARS = 2_000

# transformers 4.49 and optimum 2 have no BetterTransformer any more, which infinity uses unless told not to.
INFINITY_PINS = ("infinity-emb[torch]==0.0.78", "torch==2.13.0", "transformers==4.48.3", "optimum==1.27.0")
# The same words need the same MeCab and the same dictionary.
SHARED_PACKAGES = ("fugashi", "ipadic")
# Runs in infinity's own environment. One JSON line in: folder, texts, their token ids; one out when the model is ready.
# Then every line in is answered by the seconds of one round. Infinity's own warm-up asks for a fast tokenizer, which
# Japanese BERT has not; one batch takes its place.
INFINITY_PEER = """
import asyncio, json, os, sys, time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the libraries print belongs to the log

from infinity_emb import AsyncEmbeddingEngine, EngineArgs
from transformers import AutoTokenizer


def answer(**values):
    print(json.dumps(values), file=answers, flush=True)


async def main():
    asked = json.loads(sys.stdin.readline())
    folder, texts = asked["folder"], asked["texts"]
    if AutoTokenizer.from_pretrained(folder)(texts, truncation=True)["input_ids"] != asked["ids"]:
        sys.exit("this transformers gives the texts other token ids")
    engine = AsyncEmbeddingEngine.from_args(
        EngineArgs(
            model_name_or_path=folder, engine="torch", device="cpu", dtype="float32", batch_size=32,
            bettertransformer=True, model_warmup=False, trust_remote_code=False,
        )
    )
    async with engine:
        await engine.classify(sentences=texts[:32])
        answer(ready=True)
        for _ in sys.stdin:
            began = time.perf_counter()
            await engine.classify(sentences=texts)
            answer(seconds=time.perf_counter() - began)


asyncio.run(main())
"""

Kind = Literal["int8", "fp32", "bf16"]
Product = Callable[[], object]
# M, K, N: the two products of a BERT-base feed-forward layer on 1,024 tokens, and a large square one.
SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048))


# --- other ways to the same labels


def pipeline(folder: Path, texts: Sequence[str]) -> Callable[[], None]:
    """The Hugging Face pipeline with batches of 32, in float32 on the CPU. A round classifies all texts once.

    `folder` is an artifact with a linear head on the pooler. Raises `ModelUnavailable` or OSError when it is none.
    """
    tokenizer, cpu, inputs = load_tokenizer(folder), torch.device("cpu"), list(texts)
    classify: Any = transformers.pipeline(
        "text-classification", model=str(folder), tokenizer=tokenizer, device=cpu, dtype=torch.float32
    )

    def classify_all() -> None:
        classify(inputs, batch_size=PIPELINE_BATCH_SIZE, truncation=True, max_length=MAX_LENGTH)

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


def guide(folder: Path, texts: Sequence[str]) -> Callable[[], None]:
    """The guide's test loop: batches of 8, every text padded to 200 tokens, float32 on the CPU, no gradients.

    It runs the artifact's own model, and today's torch and transformers make its forward faster than the guide's were.
    A round labels all texts once. Raises `BadArtifact` or `ModelUnavailable`.
    """
    artifact = load_artifact(folder)
    loader = DataLoader(GuideDataset(texts, artifact.tokenizer), batch_size=GUIDE_BATCH_SIZE)

    def label_all() -> None:
        outputs: list[list[float]] = []
        with torch.no_grad():
            for batch in loader:
                logits = artifact.model(batch["input_ids"], batch["attention_mask"])  # (8, K)
                outputs.extend(torch.sigmoid(logits).cpu().numpy().tolist())
        np.array(outputs).argmax(axis=1)

    return label_all


@contextmanager
def infinity(folder: Path, texts: Sequence[str], environment: Path) -> Iterator[Callable[[], float]]:
    """The infinity engine in a process of its own: a round is one `classify` call over all texts, in seconds.

    float32 on the CPU with as many threads as torch has here, batches of 32, and BetterTransformer, as is its default.
    Its clock runs in that process, so nothing of what lies between the two is counted. `environment` is a virtual
    environment that is made on first use, which takes minutes and a registry; it is used again when it is there.
    Raises RuntimeError with the peer's last words when it ends, or when its tokenizer gives other token ids than ours.
    """
    python = _infinity_python(environment)
    ids = TextEncoder(load_tokenizer(folder))(texts, MAX_LENGTH)
    variables = {"DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with tempfile.TemporaryDirectory(prefix="tweetscore-") as scratch:
        model, log = Path(scratch) / "model", Path(scratch) / "log"
        _copy_for_infinity(folder, model)
        with (
            log.open("wb") as words,
            subprocess.Popen(
                [python, "-I", "-c", INFINITY_PEER],  # -I: it sees neither this project nor this environment
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=words,
                text=True,
                env={**os.environ, **variables},
            ) as peer,
        ):
            try:
                _ask(peer, log, folder=str(model), texts=list(texts), ids=ids)
                yield lambda: float(_ask(peer, log)["seconds"])
            finally:
                peer.kill()
                assert peer.stdin is not None
                with suppress(BrokenPipeError):
                    peer.stdin.close()


def _ask(peer: "subprocess.Popen[str]", log: Path, **question: Any) -> dict[str, Any]:
    assert peer.stdin is not None
    assert peer.stdout is not None
    with suppress(BrokenPipeError):
        peer.stdin.write(json.dumps(question) + "\n")
        peer.stdin.flush()
    line = peer.stdout.readline()
    if not line:
        words = log.read_text(encoding="utf-8", errors="replace")
        raise RuntimeError(f"the infinity process ended: {words[-LOG_CHARS:]}")
    answer: dict[str, Any] = json.loads(line)
    return answer


def _infinity_python(environment: Path) -> Path:
    """The interpreter of infinity's environment, which is made, or finished, unless it has the wanted packages."""
    python, finished = environment / "bin" / "python", environment / "requirements.txt"
    wanted = [*INFINITY_PINS, *(f"{name}=={version(name)}" for name in SHARED_PACKAGES)]
    if not finished.is_file() or finished.read_text(encoding="utf-8").splitlines() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
        finished.write_text("\n".join(wanted) + "\n", encoding="utf-8")
    return python


def _copy_for_infinity(folder: Path, copy: Path) -> None:
    """The artifact with two files changed: infinity tells a classifier by its architecture, and has no maximum length
    but the tokenizer's."""
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


# --- what the CPU can do


def matmul_gops(kind: Kind, rounds: int = 15) -> float:
    """The best plain matrix product of a type on this CPU, in 1e9 operations per second.

    A product (M, K) x (K, N) counts 2 * M * K * N operations, multiplications and additions. int8 is int8 in and int32
    out. Every implementation at hand does every shape `rounds` times; the best median counts. Nothing else is in the
    time: no quantising, no bias, no copies of the operands.
    """
    best = 0.0
    with torch.inference_mode():
        for m, k, n in SHAPES:
            for product in _int8_products(m, k, n) if kind == "int8" else _float_products(m, k, n, kind):
                product()  # the first call compiles and allocates
                best = max(best, 2 * m * k * n / 1e9 / median(_seconds(product) for _ in range(rounds)))
    return best


def _seconds(product: Product) -> float:
    began = time.perf_counter()
    product()
    return time.perf_counter() - began


def _float_products(m: int, k: int, n: int, kind: Kind) -> Iterator[Product]:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    left, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    yield lambda: functional.linear(left, weight)


def _int8_products(m: int, k: int, n: int) -> Iterator[Product]:
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n)))
    yield lambda: torch._int_mm(a, b)
    with suppress(ImportError):
        yield _onnx_product(a, b)


def _onnx_product(a: Tensor, b: Tensor) -> Product:
    """ONNX Runtime's MatMulInteger with the right side known beforehand. Raises ImportError where it is missing."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["y"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, list(a.shape))],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [a.shape[0], b.shape[1]])],
        [numpy_helper.from_array(b.numpy(), "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    # Unsigned on the left: x86 multiplies unsigned by signed, and two signed sides fall back to a far slower kernel.
    feed = {"a": a.numpy().view(np.uint8)}
    return lambda: session.run(None, feed)
