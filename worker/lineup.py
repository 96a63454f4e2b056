"""Which engine serves a model on this machine: tried out once, verified, and kept beside the artifact.

ARTIFACT.engines/KEY/choice.json   what was tried, what serves and why, and the token budget found for it
ARTIFACT.engines/KEY/graph.xml     the graph of the engine, where it has one

KEY names the artifact's digest, the hardware and the libraries: when one of them changes, all is tried again. Where the
model store cannot be written, the same lies in HOME/engines. A model that has no choice yet serves on plain torch, and
the others are tried out beside it: `tryout.py`.
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
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.artifact import Artifact, Reference, Spec
from training.batches import pad_arrays
from training.decide import Floats, choose, to_probabilities
from training.errors import BadArtifact
from worker.batch import plan_batches
from worker.choices import CHOICE, Choice, Trial, engines_folder, read_choice, spare_folder
from worker.engines import Engine, Logits, TorchEngine, Workbench, hardware, save_graph
from worker.errors import DeviceFull

log = logging.getLogger(__name__)

PLAIN = "torch-float32"
ASKED_FOR = "serves: it was asked for"
NO_ROWS = "serves: the artifact holds no validation rows to verify another engine on"
UNTRIED = "serves until a worker has tried the others out beside it"
MIN_AGREEMENT = 0.995
MAX_MEAN_DIFFERENCE = 0.02

# Tokens of one forward, padding included. A CPU is best when the activations fit its cache, a GPU when it is full.
CPU_BUDGETS = (256, 512, 1024, 2048)
GPU_BUDGETS = (4096, 8192, 16384, 32768, 65536, 131072)
# Rows of a trial: enough batches of the largest budget to show its padding, few enough to take seconds.
TRIAL_ROWS = 64
# Turns of every engine: at least and at most, and no more once all of them together have taken so long.
LEAST_TURNS, MOST_TURNS, TRIAL_SECONDS = 3, 15, 6.0
VERIFY_BUDGET = 1024
CPU_SWEEP_ROWS, GPU_SWEEP_ROWS = 256, 8192
SWEEP_ROUNDS = 2
# What loading a model takes at its peak: bytes a byte of its weights, and bytes besides. Measured at base size and of
# the starter, `tests/benchmarks/loading.py`; trying out holds several engines at once, in a process of its own.
LOADING_TAKES = (2.25, 50e6)
TRYING_OUT_TAKES = (4.5, 700e6)
# A smaller budget that is this near to the best takes less memory for nothing.
NEAR_BEST = 0.98


def default_budget(device: torch.device) -> int:
    return 1024 if device.type == "cpu" else 16384


def place(folder: Path, sha256: str, device: torch.device, wanted: str) -> Path:
    """Where the choice for this artifact, hardware and wish lies, whether or not it was made."""
    versions = [_version(name) for name in ("torch", "transformers", "openvino", "nncf")]
    key = json.dumps([sha256, hardware(device), wanted, versions])
    return engines_folder(folder) / hashlib.sha256(key.encode()).hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None  # OpenVINO and NNCF may be missing


def places(folder: Path, sha256: str, device: torch.device, wanted: str, spare: Path | None) -> list[Path]:
    """Where a choice may lie, the first place first; `spare` is the folder for what the store cannot take."""
    first = place(folder, sha256, device, wanted)
    return [first] if spare is None else [first, spare_folder(folder, spare) / first.name]


def loading_takes(weights: int) -> float:
    """Bytes that a model with so many bytes of weights takes until it is loaded and its engine is ready."""
    return LOADING_TAKES[0] * weights + LOADING_TAKES[1]


def trying_out_takes(weights: int) -> float:
    """Bytes that trying every engine out takes beside the model that serves."""
    return TRYING_OUT_TAKES[0] * weights + TRYING_OUT_TAKES[1]


def ready_engine(
    artifact: Artifact, device: torch.device, wanted: str, kept: Sequence[Path]
) -> tuple[Engine, Choice, bool]:
    """The engine that serves at once, and whether that is settled: the one that was kept, else plain torch.

    Plain torch is settled where it was asked for, and where no validation rows tell whether another agrees.
    """
    found = kept_engine(artifact, device, kept)
    if found is not None:
        return *found, True
    settled = wanted == PLAIN or artifact.reference is None
    says = ASKED_FOR if wanted == PLAIN else NO_ROWS if settled else UNTRIED
    engine = TorchEngine(artifact.model, device, torch.float32)
    choice = Choice(PLAIN, default_budget(device), hardware(device), [Trial(PLAIN, says, serves=True)])
    if settled:
        keep(kept, Workbench(artifact.model, device), choice)
    return engine, choice, settled


def kept_engine(artifact: Artifact, device: torch.device, kept: Sequence[Path]) -> tuple[Engine, Choice] | None:
    """The engine of the first choice that was kept, ready and warm; None when there is none that can be used."""
    for folder in kept:
        choice = read_choice(folder)
        if choice is None:
            continue
        graph = folder / "graph.xml"
        try:
            engine = Workbench(artifact.model, device, graph if graph.exists() else None).build(choice.engine)
            _check_kept(engine, artifact)
            return engine, choice
        except Exception as error:
            log.warning("the engine kept in %s cannot be used (%s); all are tried again", folder, first_line(error))
    return None


def pick_engine(artifact: Artifact, sha256: str, device: torch.device, wanted: str) -> tuple[Engine, Choice]:
    """The engine that serves this model here, tried out here and now when none is kept. Raises `BadArtifact` when none
    can run it."""
    kept = [place(artifact.folder, sha256, device, wanted)]
    found = kept_engine(artifact, device, kept)
    if found is not None:
        return found
    bench = Workbench(artifact.model, device)
    engine, choice = try_out(bench, artifact, device, wanted)
    keep(kept, bench, choice)
    return engine, choice


def try_out(bench: Workbench, artifact: Artifact, device: torch.device, wanted: str) -> tuple[Engine, Choice]:
    """Time every engine, then take the fastest, or the one asked for, if it agrees with float32 torch on the
    validation rows; else the next."""
    reference, pad_id = artifact.reference, artifact.tokenizer.pad_token_id
    if reference is None:
        return bench.build(PLAIN), Choice(
            PLAIN, default_budget(device), hardware(device), [Trial(PLAIN, NO_ROWS, serves=True)]
        )
    names = bench.names() if wanted == "auto" else list(dict.fromkeys([wanted, PLAIN]))
    engines, trials = _race(bench, names, reference.rows[:TRIAL_ROWS], default_budget(device), pad_id)
    if wanted == "auto":  # an engine that was asked for comes first however fast it is
        trials.sort(key=lambda trial: -(trial.tweets_per_second or 0))
    for number, trial in enumerate(trials):
        if trial.engine not in engines:
            continue
        trials[number] = verdict = _verify(trial, engines[trial.engine], artifact.spec, reference, pad_id)
        if verdict.serves:
            budget = _sweep(engines[trial.engine], reference.rows, device, pad_id)
            return engines[trial.engine], Choice(trial.engine, budget, hardware(device), trials)
        log.warning("engine %s %s", verdict.engine, verdict.says)
    raise BadArtifact(f"no engine can run {artifact.folder.name} on {device}: {trials[-1].says}")


def _race(
    bench: Workbench, names: Sequence[str], rows: Sequence[Sequence[int]], budget: int, pad_id: int
) -> tuple[dict[str, Engine], list[Trial]]:
    """The engines that can run, and a trial of each name with its tweets a second: in the median of its turns.

    They take turns, so that what else the machine does, scoring above all, meets every engine alike. The best turn
    would be the luckiest: beside a busy scorer that is another engine's each time.
    """
    engines: dict[str, Engine] = {}
    faults: dict[str, str] = {}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    for turn in range(1 + MOST_TURNS):
        if turn > LEAST_TURNS and time.perf_counter() - began > TRIAL_SECONDS:
            break
        for name in [name for name in names if name not in faults]:
            try:
                if turn == 0:
                    engines[name] = bench.build(name)
                seconds[name].append(len(rows) / _speed(engines[name], rows, budget, pad_id))
            except Exception as error:
                # Whatever an exporter or a device says of a model it cannot take: the next one in line is tried.
                engines.pop(name, None)
                faults[name] = first_line(error)
                log.warning("engine %s cannot run this model: %s", name, faults[name])
        if turn == 0:
            began = time.perf_counter()  # what was built is not counted
    return engines, [
        Trial(name, f"cannot run here: {faults[name]}")
        if name in faults
        else Trial(name, "", False, len(rows) / statistics.median(seconds[name][1:]))  # the first one warms up
        for name in names
    ]


def _check_kept(engine: Engine, artifact: Artifact) -> None:
    """A few rows, which warm the engine up too: a graph that was damaged since it was verified does not serve."""
    if artifact.reference is None:
        return
    few = artifact.reference.rows[:TRIAL_ROWS]
    found = _probabilities(_logits(engine, few, VERIFY_BUDGET, artifact.tokenizer.pad_token_id), artifact.spec)
    wanted = _probabilities(artifact.reference.logits[: len(few)], artifact.spec)
    if not np.abs(found - wanted).mean() <= MAX_MEAN_DIFFERENCE:
        raise BadArtifact("it does not give what it gave when it was verified")


def _verify(trial: Trial, engine: Engine, spec: Spec, reference: Reference, pad_id: int) -> Trial:
    """The trial with its figures on the validation rows, and in words whether it may serve."""
    wanted = _probabilities(reference.logits, spec)
    found = _probabilities(_logits(engine, reference.rows, VERIFY_BUDGET, pad_id), spec)
    agreement = float((choose(found, spec.config.task) == choose(wanted, spec.config.task)).all(axis=1).mean())
    difference = float(np.abs(found - wanted).mean())
    agrees = agreement >= MIN_AGREEMENT and difference <= MAX_MEAN_DIFFERENCE  # False of what is no number
    if trial.engine == PLAIN:
        verdict = "serves: no engine before it agrees"
    elif agrees:
        verdict = "serves: the first that agrees"
    else:
        verdict = f"may not serve, at least {MIN_AGREEMENT:.1%} and at most {MAX_MEAN_DIFFERENCE} are asked"
    says = (
        f"{verdict}; {agreement:.2%} of {len(wanted)} validation labels as float32, probabilities {difference:.4f} off"
    )
    serves = agrees or trial.engine == PLAIN
    return replace(trial, says=says, serves=serves, agreement=agreement, mean_difference=difference)


def _sweep(engine: Engine, rows: Sequence[Sequence[int]], device: torch.device, pad_id: int) -> int:
    """The token budget this engine is fastest with; larger ones are not tried once the device is full."""
    budgets, wanted = (CPU_BUDGETS, CPU_SWEEP_ROWS) if device.type == "cpu" else (GPU_BUDGETS, GPU_SWEEP_ROWS)
    rows = [rows[i % len(rows)] for i in range(wanted)]
    speeds: dict[int, float] = {}
    for budget in budgets:
        try:
            speeds[budget] = _speed(engine, rows, budget, pad_id)
        except DeviceFull:
            break
    for _ in range(SWEEP_ROUNDS):  # in turns, so that what else the machine does meets every budget alike
        for budget, speed in speeds.items():
            speeds[budget] = max(speed, _speed(engine, rows, budget, pad_id))
    if not speeds:
        return 256  # halved further where it is needed
    return min(budget for budget, speed in speeds.items() if speed >= NEAR_BEST * max(speeds.values()))


def _speed(engine: Engine, rows: Sequence[Sequence[int]], budget: int, pad_id: int) -> float:
    """Rows a second."""
    began = time.perf_counter()
    _logits(engine, rows, budget, pad_id)
    return len(rows) / (time.perf_counter() - began)


def _logits(engine: Engine, rows: Sequence[Sequence[int]], budget: int, pad_id: int) -> Logits:
    """Logits (N, K) in the rows' order."""
    plan = plan_batches([len(row) for row in rows], budget)
    found = engine.run([pad_arrays([rows[i] for i in batch], pad_id) for batch in plan])
    order = [index for batch in plan for index in batch]
    logits: Logits = np.concatenate(found)[np.argsort(order)]
    return logits


def _probabilities(logits: Logits, spec: Spec) -> Floats:
    probabilities: Floats = to_probabilities(torch.from_numpy(logits), spec.config.task, spec.temperature).numpy()
    return probabilities


def keep(kept: Sequence[Path], bench: Workbench, choice: Choice) -> bool:
    """Write a choice to the first of the places that can be written, whole or not at all. Returns whether one could."""
    for folder in kept:
        draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}")
        try:
            draft.mkdir(parents=True)
            if choice.engine.startswith("openvino"):
                save_graph(bench.graph(choice.engine), draft / "graph.xml")
            (draft / CHOICE).write_text(json.dumps(asdict(choice), ensure_ascii=False, indent=2), encoding="utf-8")
            shutil.rmtree(folder, ignore_errors=True)
            os.rename(draft, folder)
            return True
        except (OSError, RuntimeError) as error:  # the latter is OpenVINO's
            shutil.rmtree(draft, ignore_errors=True)
            log.info("the choice of an engine is not kept in %s: %s", folder, first_line(error))
    return False


def first_line(error: Any) -> str:
    """What an error says, cut to a line that can stand in a sentence."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
