"""Select the engine that serves a model on this machine: time all, verify the fastest, save the choice.

ARTIFACT.engines/KEY/choice.json   the trials, the chosen engine with the reason, and its token budget
ARTIFACT.engines/KEY/graph.xml     the graph of the engine, where it has one

KEY is a digest of the artifact, the hardware, the library versions and `GRAPHS`: a change of any starts a new trial.
Where the model store cannot be written, the files go to HOME/engines. A model without a choice serves on float32 torch
while `engine_trial.py` tries the other engines in the background.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import statistics
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.errors import BadArtifact
from training.evaluation.decisions import Floats, agreement, to_probabilities
from training.model.artifact import Artifact, Reference, Spec
from training.model.batching import Logits
from worker.engine_names import FLOAT32_TORCH
from worker.engines.engine_choice import (
    CHOICE,
    CPU_WINDOW_TWEETS,
    Choice,
    Trial,
    engines_folder,
    fallback_folder,
    read_choice,
)
from worker.engines.engines import Engine, EngineBuilder, TorchEngine, hardware, save_graph
from worker.errors import DeviceFull

log = logging.getLogger(__name__)

REQUESTED = "serves: the settings name it"
NO_ROWS = "serves: the artifact holds no validation rows to verify another engine on"
UNTRIED = "serves until a worker has tried the other engines"
# Rises when the same artifact gets other graphs, so that the engines are tried again.
GRAPHS = 2
MIN_AGREEMENT = 0.995
MAX_MEAN_DIFFERENCE = 0.02

# Tokens of one forward, padding included. A CPU is fastest when the activations fit its cache, a GPU when it is full.
CPU_BUDGETS = (256, 512, 1024, 2048)
GPU_BUDGETS = (4096, 8192, 16384, 32768, 65536, 131072)
# Rows of a window: on a CPU as many as a worker reads at once by default, on a GPU enough to fill it.
CPU_WINDOW_ROWS, GPU_WINDOW_ROWS = 512, 8192
# Tweets of a window that are compared on a GPU. The smallest that is near the best is taken: its rows come sooner.
GPU_WINDOWS = (1024, 2048, 4096, 8192, 16_384)
# Rows of the first rounds on a CPU, which only find the engines that are clearly slower, and of the check of a saved
# engine. On a GPU so few would only measure the launches of kernels.
FEW_ROWS = 64
# An engine with less than this share of the best speed is not timed again.
CLEARLY_SLOWER = 0.6
# Timed rounds over the engines, the last ones with whole windows: at most, and the seconds after which none starts.
ROUNDS, FEW_ROUNDS, TIMING_SECONDS = 5, 2, 3.0
# Seconds after which no further window is verified, and after which no budget is timed again.
VERIFY_SECONDS, SWEEP_SECONDS = 5.0, 0.5
SWEEP_ROUNDS = 3
CHECK_BUDGET = 1024
# Peak memory of a trial, which holds several engines at once: bytes per byte of weights, and a constant. Measured with
# `tests/benchmarks/loading.py` at base size and with the starter.
TRIAL_MEMORY = (4.5, 700e6)
# The smallest budget, and window, with this share of the best speed is taken.
NEAR_BEST = 0.98


def default_budget(device: torch.device) -> int:
    return 1024 if device.type == "cpu" else 16384


def choice_folder(artifact: Path, sha256: str, device: torch.device, wanted: str) -> Path:
    """The folder of the choice for this artifact, hardware and `TWEETSCORE_ENGINE`; it may not exist yet."""
    versions = [_version(name) for name in ("torch", "transformers", "openvino")]
    key = json.dumps([sha256, hardware(device), wanted, versions, GRAPHS])
    return engines_folder(artifact) / hashlib.sha256(key.encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # OpenVINO may be missing


def choice_folders(artifact: Path, sha256: str, device: torch.device, wanted: str, fallback: Path | None) -> list[Path]:
    """The folders that may hold the choice, in order of preference; `fallback` is used where the store is read-only."""
    first = choice_folder(artifact, sha256, device, wanted)
    return [first] if fallback is None else [first, fallback_folder(artifact, fallback) / first.name]


def trial_memory(weights: int) -> float:
    """Bytes that a trial of all engines needs in addition to the serving model, whose weights have `weights` bytes."""
    return TRIAL_MEMORY[0] * weights + TRIAL_MEMORY[1]


def load_engine(
    artifact: Artifact, device: torch.device, wanted: str, folders: Sequence[Path]
) -> tuple[Engine, Choice, bool]:
    """The engine to serve with now, and whether the choice is final: the saved choice, else float32 torch.

    Float32 torch is final where the settings name it, and where no validation rows can verify another engine.
    """
    saved = load_saved_engine(artifact, device, folders)
    if saved is not None:
        return *saved, True
    final = wanted == FLOAT32_TORCH or artifact.reference is None
    verdict = REQUESTED if wanted == FLOAT32_TORCH else NO_ROWS if final else UNTRIED
    engine = TorchEngine(artifact.model, device, torch.float32)
    choice = _float32_choice(device, verdict)
    if final:
        save_choice(folders, EngineBuilder(artifact.model, device), choice)
    return engine, choice, final


def load_saved_engine(
    artifact: Artifact, device: torch.device, folders: Sequence[Path]
) -> tuple[Engine, Choice] | None:
    """The engine of the first saved choice that works, warmed up; None when there is none."""
    for folder in folders:
        choice = read_choice(folder)
        if choice is None:
            continue
        graph = folder / "graph.xml"
        try:
            engine = EngineBuilder(artifact.model, device, graph if graph.exists() else None).build(choice.engine)
            _check_saved(engine, artifact)
            return engine, choice
        except Exception as error:
            log.warning(
                "the engine saved in %s cannot be used (%s); all engines are tried again", folder, first_line(error)
            )
    return None


def select_engine(
    builder: EngineBuilder, artifact: Artifact, device: torch.device, wanted: str
) -> tuple[Engine, Choice]:
    """Time the engines, then take the fastest that agrees with float32 torch on the validation rows.

    An engine that the settings name is tried first, whatever its speed. Raises `BadArtifact` when no engine can run.
    """
    reference = artifact.reference
    if reference is None:
        return builder.build(FLOAT32_TORCH), _float32_choice(device, NO_ROWS)
    slower = builder.slower() if wanted == "auto" else {}
    names = builder.names() if wanted == "auto" else list(dict.fromkeys([wanted, FLOAT32_TORCH]))
    names = [name for name in names if name not in slower]
    windows = _windows(len(reference.rows), CPU_WINDOW_ROWS if device.type == "cpu" else GPU_WINDOW_ROWS)
    engines, trials = _time_engines(builder, names, [reference.rows[i] for i in windows[0]], device)
    trials += [Trial(name, reason) for name, reason in slower.items()]
    if wanted == "auto":
        trials.sort(key=lambda trial: -(trial.tweets_per_second or 0))
    for number, trial in enumerate(trials):
        if trial.engine not in engines:
            continue
        trials[number], budget = _verify(trial, engines[trial.engine], artifact.spec, reference, windows, device)
        if trials[number].serves:
            engine = engines[trial.engine]
            window = CPU_WINDOW_TWEETS if device.type == "cpu" else _fastest_window(engine, reference, budget)
            return engine, Choice(trial.engine, budget, hardware(device), trials, window)
        log.warning("engine %s %s", trial.engine, trials[number].verdict)
    reason = next(trial.verdict for trial in reversed(trials) if trial.engine in names)
    raise BadArtifact(f"no engine can run {artifact.folder.name} on {device}: {reason}")


def _windows(rows: int, size: int) -> list[list[int]]:
    """Numbers of the validation rows in windows of `size` rows; every row is in one, and the last is filled up."""
    return [[number % rows for number in range(start, start + size)] for start in range(0, rows, size)]


def _float32_choice(device: torch.device, verdict: str) -> Choice:
    trials = [Trial(FLOAT32_TORCH, verdict, serves=True)]
    return Choice(FLOAT32_TORCH, default_budget(device), hardware(device), trials)


def _time_engines(
    builder: EngineBuilder, names: Sequence[str], window: Sequence[Sequence[int]], device: torch.device
) -> tuple[dict[str, Engine], list[Trial]]:
    """The engines that can run, and a trial of each name with its median tweets a second.

    The engines alternate, so that other load of the machine, mainly scoring, affects all of them equally. The median is
    used because the best round varies by chance. An engine that is clearly slower is dropped after a round.
    """
    engines: dict[str, Engine] = {}
    errors: dict[str, str] = {}
    speeds: dict[str, list[float]] = {name: [] for name in names}
    left, budget, began = list(names), default_budget(device), time.perf_counter()
    for number in range(ROUNDS):
        if (number and len(left) == 1) or (number >= FEW_ROUNDS and time.perf_counter() - began > TIMING_SECONDS):
            break
        rows = window[:FEW_ROWS] if device.type == "cpu" and number < FEW_ROUNDS else window
        for name in left:
            try:
                if number == 0:
                    engines[name] = builder.build(name)
                    if device.type != "cpu":
                        _speed(engines[name], rows, budget)  # compiles kernels and captures graphs
                speeds[name].append(_speed(engines[name], rows, budget))
            except Exception as error:
                # An exporter or a device may raise anything for a model it does not support; the others are tried.
                engines.pop(name, None)
                errors[name] = first_line(error)
                log.warning("engine %s cannot run this model: %s", name, errors[name])
        left = [name for name in left if name not in errors]
        fastest = max((max(speeds[name]) for name in left), default=0.0)
        left = [name for name in left if max(speeds[name]) >= CLEARLY_SLOWER * fastest]
        if number == 0:
            began = time.perf_counter()  # the time of building does not count
    return engines, [
        Trial(name, f"cannot run here: {errors[name]}")
        if name in errors
        else Trial(name, "", False, statistics.median(speeds[name][1:] or speeds[name]))  # the first round warms up
        for name in names
    ]


def _check_saved(engine: Engine, artifact: Artifact) -> None:
    """Raise `BadArtifact` if a graph was damaged since it was verified. The few rows also warm the engine up."""
    if artifact.reference is None:
        return
    few = artifact.reference.rows[:FEW_ROWS]
    found = _probabilities(run_rows(engine, few, CHECK_BUDGET), artifact.spec)
    expected = _probabilities(artifact.reference.logits[: len(few)], artifact.spec)
    if not np.abs(found - expected).mean() <= MAX_MEAN_DIFFERENCE:
        raise BadArtifact("its results differ from those it was verified with")


def _verify(
    trial: Trial,
    engine: Engine,
    spec: Spec,
    reference: Reference,
    windows: Sequence[Sequence[int]],
    device: torch.device,
) -> tuple[Trial, int]:
    """The trial with its agreement on the validation rows and the verdict, and the fastest token budget."""
    logits, rows, speeds = _run_windows(engine, reference, windows, device)
    budget = smallest_near_best(speeds)
    expected, found = _probabilities(reference.logits[rows], spec), _probabilities(logits, spec)
    agreed = agreement(found, expected, spec.config.task)
    difference = float(np.abs(found - expected).mean())
    agrees = agreed >= MIN_AGREEMENT and difference <= MAX_MEAN_DIFFERENCE  # False for NaN
    if trial.engine == FLOAT32_TORCH:
        verdict = "serves: no faster engine agrees"
    elif agrees:
        verdict = "serves: the first that agrees"
    else:
        verdict = f"does not serve, it needs at least {MIN_AGREEMENT:.1%} and at most {MAX_MEAN_DIFFERENCE}"
    labels, numbers = ("values", "outputs") if spec.config.task == "continuous" else ("labels", "probabilities")
    verdict += f"; {agreed:.2%} of {len(expected)} validation {labels} as float32, {numbers} {difference:.4f} off"
    serves = agrees or trial.engine == FLOAT32_TORCH
    return replace(trial, verdict=verdict, serves=serves, agreement=agreed, mean_difference=difference), budget


def _run_windows(
    engine: Engine, reference: Reference, windows: Sequence[Sequence[int]], device: torch.device
) -> tuple[Logits, list[int], dict[int, float]]:
    """Logits (N, K), the numbers of their N rows, and tokens a second for each token budget.

    Each window is run with the next budget, so the same work verifies the engine and compares the budgets. At least one
    window is verified. Larger budgets are left out once the device is full.
    """
    default = default_budget(device)
    # From the default outwards: a large model on a slow device has time for few of them.
    budgets = sorted(CPU_BUDGETS if device.type == "cpu" else GPU_BUDGETS, key=lambda budget: abs(budget - default))
    speeds: dict[int, float] = {}
    logits: dict[int, Logits] = {}
    number, began, seconds = 0, time.perf_counter(), 0.0
    while number < max(len(windows), len(budgets)) or (
        seconds < SWEEP_SECONDS and number < SWEEP_ROUNDS * len(budgets)
    ):
        if logits and seconds > VERIFY_SECONDS:
            break
        # Another budget for each window of a pass, and for each pass of a window.
        passes, which = divmod(number, len(windows))
        budget, window = budgets[(which + passes) % len(budgets)], windows[which]
        rows = [reference.rows[i] for i in window]
        start = time.perf_counter()
        try:
            found = run_rows(engine, rows, budget)
        except DeviceFull:
            if budget == min(budgets):
                raise
            budgets = [smaller for smaller in budgets if smaller < budget]
            continue
        speed = sum(map(len, rows)) / (time.perf_counter() - start)
        speeds[budget] = max(speeds.get(budget, 0.0), speed)
        logits.update(zip(window, found, strict=True))
        number, seconds = number + 1, time.perf_counter() - began
    return np.stack(list(logits.values())), list(logits), speeds


def _fastest_window(engine: Engine, reference: Reference, budget: int) -> int:
    """The number of tweets in a window with which a GPU is fastest; validation rows repeat to fill it."""
    rows = list(islice(cycle(reference.rows), max(GPU_WINDOWS)))
    speeds = {count: max(_speed(engine, rows[:count], budget) for _ in range(SWEEP_ROUNDS)) for count in GPU_WINDOWS}
    return smallest_near_best(speeds)


def smallest_near_best(speeds: Mapping[int, float]) -> int:
    """The smallest key whose speed is near the best: it needs less memory, or less time."""
    return min(key for key, speed in speeds.items() if speed >= NEAR_BEST * max(speeds.values()))


def _speed(engine: Engine, rows: Sequence[Sequence[int]], budget: int) -> float:
    """Rows a second."""
    began = time.perf_counter()
    run_rows(engine, rows, budget)
    return len(rows) / (time.perf_counter() - began)


def run_rows(engine: Engine, rows: Sequence[Sequence[int]], budget: int) -> Logits:
    """Logits (N, K) in the rows' order."""
    batches = engine.batches(rows, budget)
    found = engine.run(batches)
    order = [index for batch in batches for index in batch.rows]
    logits: Logits = np.concatenate(found)[np.argsort(order)]
    return logits


def _probabilities(logits: Logits, spec: Spec) -> Floats:
    probabilities: Floats = to_probabilities(torch.from_numpy(logits), spec.config.task, spec.temperature).numpy()
    return probabilities


def save_choice(folders: Sequence[Path], builder: EngineBuilder, choice: Choice) -> bool:
    """Write a choice, atomically, to the first folder that can be written. Returns whether there was one."""
    for folder in folders:
        draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            draft.mkdir(parents=True)
            if choice.engine.startswith("openvino"):
                save_graph(builder.graph(choice.engine), draft / "graph.xml")
            (draft / CHOICE).write_text(json.dumps(asdict(choice), ensure_ascii=False, indent=2), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(draft, folder)
            return True
        except (OSError, RuntimeError) as error:  # OpenVINO raises RuntimeError
            shutil.rmtree(draft, ignore_errors=True)
            log.info("the choice of an engine cannot be saved in %s: %s", folder, first_line(error))
    return False


def first_line(error: Any) -> str:
    """The first line of an error's text, cut to fit into a log message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
