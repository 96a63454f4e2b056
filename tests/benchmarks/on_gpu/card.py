"""The card and what it can do: its name and memory, the speed of plain matrix products and copies."""

import gc
import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.on_gpu.material import Bench
from tests.benchmarks.on_gpu.parts import Record, middle


def card(bench: Bench, record: Record) -> None:
    machine = describe(bench.device)
    record.data["machine"] = bench.machine = machine
    table = record.table("The machine", "", "")
    for name, value in machine.items():
        table.add(name, value)
    for name, consequence in bench.missing.items():
        record.note(f"missing: {name}; {consequence}")
    if bench.source_is_sample:
        record.note(f"no real tweets at hand: those of the sample, {bench.source}")
    table = record.table("Plain matrix products and copies", "", "median", "unit", "rounds")
    n, rounds = bench.size.product, bench.size.product_rounds
    kinds = ["bfloat16", "float16", "float32"] if bench.device.type == "cuda" else ["float32"]
    for kind in kinds:
        seconds = product_seconds(n, getattr(torch, kind), bench.device, rounds)
        bench.products[kind] = 2 * n**3 / middle(seconds)
        record.data[f"product_{kind}"] = {"n": n, "flops": bench.products[kind], "seconds": seconds}
        table.add(f"{kind}, {n}^3", bench.products[kind] / 1e12, "TFLOP/s", len(seconds))
    size = bench.size.copied_bytes
    seconds = copy_seconds(size, bench.device, rounds)
    record.data["copy"] = {"bytes": size, "bytes_per_second": 2 * size / middle(seconds), "seconds": seconds}
    table.add(f"copy of {size / 1e6:,.0f} MB, read and written", 2 * size / middle(seconds) / 1e9, "GB/s", len(seconds))


def describe(device: torch.device) -> dict[str, Any]:
    versions = {name: _version(name) for name in ("torch", "transformers", "tokenizers", "numpy", "triton")}
    found: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%d %H:%M"), "python": platform.python_version(), **versions,
        "cores": len(os.sched_getaffinity(0)), "cpu": _cpu_name(),
    }  # fmt: skip
    if device.type != "cuda":
        return {"card": "none: this is the CPU", **found}
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name, "memory_gb": properties.total_memory / 1e9,
        "multiprocessors": properties.multi_processor_count,
        "compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda,
        "driver": _driver(), "cards": torch.cuda.device_count(), **found,
    }  # fmt: skip


def product_seconds(n: int, dtype: torch.dtype, device: torch.device, rounds: int) -> list[float]:
    # Random numbers: products of zeros use less power, and are faster for it.
    left, right = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return device_seconds(lambda: left @ right, device, rounds)


def copy_seconds(size: int, device: torch.device, rounds: int) -> list[float]:
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return device_seconds(lambda: target.copy_(source), device, rounds)


def device_seconds(work: Callable[[], object], device: torch.device, rounds: int, repeats: int = 5) -> list[float]:
    """Seconds of one run of `work`, a value per round of several runs."""
    for _ in range(2):
        work()
    found = []
    for _ in range(rounds):
        synchronise(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        synchronise(device)
        found.append((time.perf_counter() - began) / repeats)
    return found


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give the memory of what is no longer used back to the card, for other processes too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _driver() -> str:
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        return "unknown"
    return found.group() if found else "unknown"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
