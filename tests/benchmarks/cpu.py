"""What this CPU can do: its name, its instructions, and its fastest matrix products. The measure of every other figure.

Knows no model and nothing of how a worker scores.
"""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.nn import functional

from worker.engines.engines import openvino
from worker.errors import EngineUnavailable

Kind = Literal["fp32", "bf16", "int8"]
KINDS: tuple[Kind, ...] = ("fp32", "bf16", "int8")
Work = Callable[[], object]
# M, K, N: the two products of a BERT-base feed-forward layer on 1,024 tokens, and a large square one.
SHAPES = ((1024, 768, 3072), (1024, 3072, 768), (2048, 2048, 2048))
# The instruction sets that decide how fast a matrix product is.
INSTRUCTIONS = (
    "avx", "avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16",
    "amx_int8", "asimd", "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip
INT8_INSTRUCTIONS = {"avx_vnni", "avx512_vnni", "amx_int8", "asimddp", "i8mm"}
BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16", "bf16"}
# A round is the median of this many products. An implementation whose first ones are this much slower than the best of
# the others is left out: without the right instructions some take a hundred times as long.
REPEATS = 15
HOPELESS = 3.0


@dataclass(frozen=True)
class Cpu:
    """The machine that figures were measured on."""

    name: str
    instructions: list[str]
    cores: int
    logical_cores: int
    threads: int
    memory_gb: float
    system: str = field(default_factory=lambda: f"{platform.system()}, Python {platform.python_version()}")

    def __str__(self) -> str:
        return (
            f"{self.name}, {self.cores} cores ({self.logical_cores} logical, {self.threads} threads), "
            f"{self.memory_gb:.0f} GB, {' '.join(self.instructions)}; {self.system}"
        )

    def has(self, kind: Kind) -> bool:
        """Whether it has instructions for products of a type. bf16 and int8 are emulated without them."""
        needed = {"bf16": BF16_INSTRUCTIONS, "int8": INT8_INSTRUCTIONS}.get(kind)
        return needed is None or bool(needed & set(self.instructions))

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Product:
    """The fastest matrix product of a type: who does which shape, at how many 1e9 operations a second."""

    kind: Kind
    library: str
    shape: tuple[int, int, int]
    gops: float
    work: Work

    def round(self, repeats: int = REPEATS) -> float:
        """1e9 operations a second, measured again."""
        m, k, n = self.shape
        return 2 * m * k * n / 1e9 / median(_seconds(self.work) for _ in range(repeats))


def this_cpu() -> Cpu:
    lines = _cpu_lines()
    flags = set((lines.get("flags") or lines.get("Features") or "").split())
    logical = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Cpu(
        name=lines.get("model name") or platform.processor() or platform.machine(),
        instructions=[name for name in INSTRUCTIONS if name in flags],
        cores=psutil.cpu_count(logical=False) or logical, logical_cores=logical, threads=torch.get_num_threads(),
        memory_gb=psutil.virtual_memory().total / 1e9,
    )  # fmt: skip


def _cpu_lines() -> dict[str, str]:
    """The lines of the first core in /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n", 1)[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def best_product(kind: Kind, repeats: int = REPEATS) -> Product:
    """The fastest plain matrix product of a type on this CPU.

    A product (M, K) x (K, N) counts 2 * M * K * N operations, multiplications and additions. int8 is int8 in and int32
    out. Nothing else is in the time: no quantising, no bias, no copies of the operands.
    """
    best: Product | None = None
    with torch.inference_mode():
        for m, k, n in SHAPES:
            for library, work in _int8_products(m, k, n) if kind == "int8" else _float_products(m, k, n, kind):
                work()  # the first call compiles and allocates
                product = Product(kind, library, (m, k, n), 2 * m * k * n / 1e9 / _seconds(work), work)
                if best is not None and product.gops * HOPELESS < best.gops:
                    continue
                product = Product(kind, library, (m, k, n), product.round(repeats), work)
                best = product if best is None or product.gops > best.gops else best
    assert best is not None
    return best


def _seconds(work: Work) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _float_products(m: int, k: int, n: int, kind: Kind) -> Iterator[tuple[str, Work]]:
    dtype = torch.float32 if kind == "fp32" else torch.bfloat16
    left, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    yield "PyTorch", lambda: functional.linear(left, weight)
    with suppress(EngineUnavailable):
        yield "OpenVINO", _openvino_product(left.float(), weight.float(), "f32" if kind == "fp32" else "bf16")


def _int8_products(m: int, k: int, n: int) -> Iterator[tuple[str, Work]]:
    a, b = (torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((m, k), (k, n)))
    by_column = b.t().contiguous().t()
    yield "PyTorch", lambda: torch._int_mm(a, by_column)
    yield "PyTorch", lambda: torch._int_mm(a, b)
    with suppress(ImportError):
        yield "ONNX Runtime", _onnx_product(a, b)


def _openvino_product(left: Tensor, weight: Tensor, precision: str) -> Work:
    """OpenVINO's MatMul with the right side known beforehand. Raises `EngineUnavailable` where it is missing."""
    ov = openvino()
    from openvino import opset13

    parameter = opset13.parameter(list(left.shape), np.float32)
    graph = ov.Model([opset13.matmul(parameter, opset13.constant(weight.numpy()), False, True)], [parameter])
    compiled = ov.Core().compile_model(
        graph, "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": precision, "ENABLE_CPU_PINNING": False,
        },
    )  # fmt: skip
    request = compiled.create_infer_request()
    request.set_input_tensor(ov.Tensor(left.numpy()))
    return lambda: request.infer()


def _onnx_product(a: Tensor, b: Tensor) -> Work:
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
