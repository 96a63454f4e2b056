"""Engines alone: the same ids as the reference tokenizer, agreement with float32, speed, and a full card."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from tests.benchmarks.on_gpu.card import release
from tests.benchmarks.on_gpu.material import Bench, Measured, forward
from tests.benchmarks.on_gpu.parts import Record, Table, middle, timed
from training.evaluation.decisions import to_probabilities
from training.model.batching import Batch, Logits
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, encode
from worker.engines.engine_choice import Choice
from worker.engines.engine_selection import run_rows
from worker.engines.engines import Engine
from worker.errors import DeviceFull
from worker.scoring.scoring_model import ScoringModel

AGREEMENT_BUDGET = 16_384
COLUMNS = ("engine", "token budget", "tweets/s", "with planning", "of the product", "fill", "rounds", "least", "most")
# What is measured of an engine whose budgets do not matter: the baseline.
FEW_BUDGETS = 2


def same_ids(bench: Bench, record: Record) -> None:
    """The worker's ids of real tweets beside those of `BertJapaneseTokenizer`."""
    texts = [clean(text) for text in bench.many_texts(bench.size.reference_ids)]
    tokenizer = bench.base.artifact.tokenizer
    ours, theirs = TextEncoder(tokenizer)(texts, 200), encode(tokenizer, texts, 200)
    equal = sum(a == b for a, b in zip(ours, theirs, strict=True))
    record.data |= {"tweets": len(texts), "equal": equal, "reference": type(tokenizer).__name__}
    record.table("Token ids", "reference", "tweets", "equal").add(type(tokenizer).__name__, len(texts), equal)
    if equal != len(texts):
        raise AssertionError(f"{len(texts) - equal} of {len(texts)} tweets have other ids than the reference")


def agreement(bench: Bench, record: Record) -> None:
    """Each engine beside float32 torch on the CPU."""
    table = record.table(
        "Agreement with float32 torch on the CPU", "model", "engine", "tweets", "equal labels", "mean difference",
        "largest difference",
    )  # fmt: skip
    for measured in (bench.base, bench.starter):
        rows = measured.rows[: bench.size.agreement_rows]
        expected = probabilities(measured, forward(measured.artifact.model, rows))
        for name in bench.engines:
            try:
                found = probabilities(measured, run_rows(measured.engine(name, bench.device), rows, AGREEMENT_BUDGET))
                _agreement(table, record, measured.name, name, expected, found)
            except Exception as error:
                record.failed(f"{name}, {measured.name}", error)
    record.note("base has random weights, whose probabilities differ by little more than rounding; starter is trained")


def _agreement(table: Table, record: Record, model: str, name: str, expected: Logits, found: Logits) -> None:
    equal = float((expected.argmax(1) == found.argmax(1)).mean())
    difference = np.abs(expected - found)
    table.add(model, name, len(found), f"{equal:.2%}", float(difference.mean()), float(difference.max()))
    record.data.setdefault(model, {})[name] = {
        "equal": equal, "mean": float(difference.mean()), "largest": float(difference.max()),
    }  # fmt: skip


def alone(bench: Bench, record: Record) -> None:
    """Every engine at base size over a window of tweets, with several token budgets."""
    _speeds(bench, record, bench.base, bench.engines, share_of_time=0.95)


def alone_starter(bench: Bench, record: Record) -> None:
    few = bench.size.budgets[-1:] if bench.size.small else None
    _speeds(bench, record, bench.starter, bench.engines, budgets=few)


def _speeds(
    bench: Bench, record: Record, measured: Measured, names: Sequence[str], *,
    budgets: Sequence[int] | None = None, share_of_time: float = 1.0,
) -> None:  # fmt: skip
    title = (
        f"Engine alone, {measured.name}: {len(measured.rows):,} tweets of {measured.tokens / len(measured.rows):.1f}"
    )
    table = record.table(f"{title} tokens", *COLUMNS)
    for number, name in enumerate(names):
        if record.left <= 0:
            record.note(f"no time for {', '.join(names[number:])}")
            break
        share = record.left * share_of_time / (len(names) - number)
        few = name.startswith("torch-float32")
        tried = list(budgets or (bench.size.budgets[:FEW_BUDGETS] if few else reversed(bench.size.budgets)))
        engine: Any = None
        plain: WithoutGraphs | None = None
        try:
            engine = measured.engine(name, bench.device)
            _budgets(bench, record, table, measured, engine, name, tried, share)
            if name.startswith("packed") and measured is bench.base:
                plain = WithoutGraphs(engine, bench.device)
                _budgets(bench, record, table, measured, plain, plain.name, tried[-2:-1] or tried, share)
        except Exception as error:
            record.failed(name, error)
        engine = plain = None
        release(bench.device)


def _budgets(
    bench: Bench, record: Record, table: Table, measured: Measured, engine: Any, name: str, budgets: Sequence[int],
    seconds: float,
) -> None:  # fmt: skip
    """Rows of the table: the largest budget first, as its memory then serves the others."""
    least = record.left - seconds
    for budget in budgets:
        if record.left <= least:
            record.note(f"{name}: no time for a budget of {budget:,}")
            continue
        try:
            planning = timed(lambda b=budget: engine.batches(measured.rows, b), 3)  # type: ignore[misc]
            batches = engine.batches(measured.rows, budget)
            for _ in range(2):
                engine.run(batches)
            rounds = timed(lambda made=batches: engine.run(made), bench.size.rounds, lambda: record.left - least)  # type: ignore[misc]
        except DeviceFull as error:
            record.failed(f"{name}, {budget:,} tokens", error)
            continue
        texts, speed = len(measured.rows), len(measured.rows) / middle(rounds)
        product = bench.products.get(name.split("-")[1].split()[0])
        share = measured.operations / middle(rounds) / product if product else None
        fill = measured.tokens / sum(batch.tokens for batch in batches)
        bench.speeds[name, measured.name, budget] = speed
        table.add(
            name, budget, speed, texts / (middle(rounds) + middle(planning)), share and f"{share:.1%}", f"{fill:.1%}",
            len(rounds), texts / max(rounds), texts / min(rounds),
        )  # fmt: skip
        record.data.setdefault(measured.name, {}).setdefault(name, {})[budget] = {
            "tweets_per_second": speed, "seconds": rounds, "planning_seconds": planning, "fill": fill,
            "share_of_product": share, "batches": len(batches), "operations": measured.operations,
        }  # fmt: skip


class WithoutGraphs:
    """A packed engine whose kernels are launched one by one, to show what graphs give."""

    def __init__(self, engine: Any, device: torch.device) -> None:
        self.name = f"{engine.name} without graphs"
        self.batches: Callable[..., list[Batch]] = engine.batches
        self._network, self._device = engine._network, device

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        found = []
        for batch in batches:
            *arrays, slots = (torch.from_numpy(array).to(self._device, non_blocking=True) for array in batch.arrays)
            found.append(self._network(*arrays)[slots].float())
        return [part.cpu().numpy() for part in found]


# --- a card without memory


def full_card(bench: Bench, record: Record) -> None:
    """Fill the card, and score a window: the token budget is halved until it fits."""
    name = bench.fastest[0] if bench.speeds else bench.engines[0]
    measured, budget = bench.base, max(bench.size.budgets)
    rows = measured.rows
    expected = probabilities(measured, run_rows(measured.engine(name, bench.device), rows, min(bench.size.budgets)))
    engine: Any = measured.engine(name, bench.device)
    filling: list[torch.Tensor] = []
    if bench.device.type == "cuda":
        release(bench.device)
        free, _ = torch.cuda.mem_get_info(bench.device)
        filling.append(torch.empty(max(0, free - bench.size.free_bytes), dtype=torch.uint8, device=bench.device))
        record.note(f"{filling[0].numel() / 1e9:.1f} GB filled, {bench.size.free_bytes / 1e9:.1f} GB left")
    else:
        engine = SmallCard(engine, budget // 4)
        record.note("no card: the engine itself refuses batches of more than a quarter of the budget")
    model = ScoringModel(0, measured.artifact, engine, Choice(name, budget, "", []))
    try:
        scores = model.forward(rows)
    finally:
        filling.clear()
    difference = float(np.abs(scores.probabilities - expected).max())
    record.data |= {
        "engine": name, "budget": budget, "left": model.token_budget, "tweets": len(rows), "largest": difference,
    }  # fmt: skip
    table = record.table("Out of memory", "engine", "tweets", "budget before", "after", "largest difference")
    table.add(name, len(rows), budget, model.token_budget, difference)
    if model.token_budget >= budget:
        raise AssertionError("the card was not full: the budget is what it was")


class SmallCard:
    """An engine on a device that has memory for batches of a few tokens only."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self.name, self.batches, self._engine, self._tokens = engine.name, engine.batches, engine, tokens

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        if max(batch.tokens for batch in batches) > self._tokens:
            raise DeviceFull(f"{self.name} has no memory left for a batch this large")
        return self._engine.run(batches)


# --- helpers


def probabilities(measured: Measured, found: Logits) -> Logits:
    spec = measured.artifact.spec
    made: Logits = to_probabilities(torch.from_numpy(found), spec.config.task, spec.temperature).numpy()
    return made
