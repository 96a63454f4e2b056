"""What a scoring benchmark found, as Markdown for people and as JSON for programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.benchmarks.cpu import Cpu, Kind, Product
from tests.benchmarks.race import Figure, Round, speed_of

# At least so much is asked; two values are those of a CPU without int8 instructions and of one that has them.
AT_LEAST: dict[str, float | tuple[float | None, float]] = {
    "end_to_end_over_pipeline": (3.4, 9.3),
    "end_to_end_over_infinity": (None, 3.5),
    "end_to_end_over_guide": (None, 35.0),
    "end_to_end_over_bare": 0.93,
    "bare_over_matmul": (None, 0.75),
    "student_over_pipeline": (25.0, 50.0),
    "cascade_over_pipeline": (8.0, 20.0),
    "end_to_end_over_bare_starter": 0.93,
    "tokenise_over_reference": 5.0,
    "publish_over_celery": 70.0,
    "million_rows_sqlite": 0.9,
    "million_rows_postgresql": 0.9,
}
AT_MOST = {"idle_extra_ms_p50": 20.0, "idle_extra_ms_p99": 60.0, "two_workers": 0.0}

# What others publish, on other machines and with other models and lengths. No ratio is made of it.
PUBLISHED = """
Published by others, on other machines, so no ratio is given:

- text-embeddings-inference (TEI): its README has pictures of latency and throughput of bge-base-en-v1.5 on one NVIDIA
  A10 with 512 tokens, and no figure for a CPU.
- infinity's documentation has TEI cpu-0.6 on a CPU (Google g2-standard-16, Intel Cascade Lake, bge-small-en-v1.5):
  1,104 s for 10 requests of 256 sentences (1.15 million tokens). In the same table: sentence-transformers 257 s,
  infinity with PyTorch 353 s ("needs revision"), infinity with ONNX int8 100 s.
"""
UNITS = {"fp32": "GFLOP/s", "bf16": "GFLOP/s", "int8": "GOP/s"}


@dataclass(frozen=True)
class Result:
    """`rounds` are the speeds of each race, `seconds` those of each part, `missing` the contestants that could not be
    measured and why, `settings` what a peer was measured with."""

    cpu: Cpu
    products: Mapping[Kind, Product]
    figures: Mapping[str, Figure]
    rounds: Mapping[str, Sequence[Round]]
    seconds: Mapping[str, float]
    missing: Mapping[str, str]
    engines: Mapping[str, str]
    settings: Mapping[str, str]

    def speeds(self) -> dict[str, float]:
        """The median tweets a second of each contestant; a later race counts."""
        names = {name: rounds for rounds in self.rounds.values() for found in rounds for name in found}
        return {name: speed_of(rounds, name) for name, rounds in names.items()}


def markdown(result: Result, *, targets: bool) -> str:
    products = ", ".join(
        f"{kind} {product.gops:,.0f} {UNITS[kind]} ({product.library}, {'x'.join(map(str, product.shape))})"
        for kind, product in result.products.items()
    )
    lines = [f"CPU: {result.cpu}", f"Matrix products: {products}", ""]
    if speeds := result.speeds():
        lines += ["| | tweets/s | with |", "|---|---|---|"]
        lines += [f"| {name} | {speed:,.1f} | {_with(result, name)} |" for name, speed in speeds.items()]
        lines += [""]
    lines += ["| figure | median | least | greatest | rounds | asked |", "|---|---|---|---|---|---|"]
    for key, found in result.figures.items():
        asked = _asked(key, found, result.cpu) if targets else ""
        lines.append(
            f"| {key} | {found.value:.3f} | {found.least:.3f} | {found.greatest:.3f} | {found.rounds} | {asked} |"
        )
    lines += [f"\nNot measured: {name}, because of: {reason}" for name, reason in result.missing.items()]
    lines += [PUBLISHED, "| part | seconds |", "|---|---|"]
    lines += [f"| {part} | {seconds:.1f} |" for part, seconds in result.seconds.items()]
    return "\n".join(lines)


def as_json(result: Result) -> dict[str, Any]:
    written: dict[str, Any] = {
        "machine": result.cpu.as_json(),
        "products": {
            kind: {"gops": product.gops, "library": product.library, "shape": product.shape}
            for kind, product in result.products.items()
        },
        "engines": dict(result.engines), "settings": dict(result.settings), "tweets_per_second": result.speeds(),
        "rounds": dict(result.rounds), "missing": dict(result.missing), "seconds": dict(result.seconds),
    }  # fmt: skip
    written |= {key: found.value for key, found in result.figures.items()}
    written["details"] = {
        key: {"min": found.least, "max": found.greatest, "rounds": found.rounds, **found.details}
        for key, found in result.figures.items()
    }
    return written


def _with(result: Result, name: str) -> str:
    if name in result.settings:
        return result.settings[name]
    return result.engines.get(name.partition("_")[0], "")


def _asked(key: str, found: Figure, cpu: Cpu) -> str:
    least = AT_LEAST.get(key)
    if isinstance(least, tuple):
        least = least[cpu.has("int8")]
    if least is not None:
        return f"at least {least:g}: {'reached' if found.value >= least else 'missed'}"
    if key in AT_MOST:
        return f"at most {AT_MOST[key]:g}: {'reached' if found.value <= AT_MOST[key] else 'missed'}"
    return ""
