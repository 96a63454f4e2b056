"""What the training loop can be told: precision, accumulation, weights, patience, optimisers and schedules."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

from tests.support.training_loop import Bench, maker, stop_at
from training.config import make_config
from training.errors import BadConfig, StopRequested
from training.loop import memory
from training.loop.fit import Hooks, build_optimizer, build_scheduler, out_of_patience
from training.loop.predict import loss_function
from training.model.batching import cut
from training.model.classifier import half_precision

EXACT = {"pooling": "mean", "dropout": 0.0, "precision": "float32", "schedule": "constant"}
Make = Callable[..., Bench]


@pytest.fixture
def bench(tiny_encoder: Path, labelled_csv: Path) -> Make:
    return maker(tiny_encoder, labelled_csv)


def weights(made: Bench, folder: Path) -> dict[str, torch.Tensor]:
    model = made.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # those of the encoder too: nothing is left to chance
    made.fit(model, folder)
    return dict(model.state_dict())


def test_accumulated_batches_are_one_step_with_the_gradient_of_all_their_rows(bench: Make, tmp_path: Path) -> None:
    # 48 rows: one batch of all, and batches of 10 with one of 8, which must not count for more than it holds.
    whole = weights(bench(**EXACT, epochs=1, train_batch_size=48), tmp_path / "whole")
    parts = weights(bench(**EXACT, epochs=1, train_batch_size=10, gradient_accumulation_steps=5), tmp_path / "parts")
    untouched = dict(bench(**EXACT).model().state_dict())
    # AdamW's first step is the sign of the gradient: a weight with next to none may turn about, by 2 learning rates.
    assert sum(int(((whole[n] - parts[n]).abs() > 1e-4).sum()) for n in whole) <= 0.001 * sum(
        w.numel() for w in whole.values()
    )
    assert any(not torch.allclose(whole[name], untouched[name]) for name in whole)


def test_a_batch_of_long_texts_goes_in_pieces_to_the_same_losses(
    bench: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(**EXACT, epochs=2)

    def run(budget: int) -> tuple[list[float], int, int]:
        """Losses, steps, forwards."""
        monkeypatch.setitem(memory.TOKENS_AT_ONCE, "cpu", budget)
        model, forwards, steps = made.model(), [], []
        model.register_forward_hook(lambda *_: forwards.append(1))
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        epochs = made.fit(model, tmp_path / str(budget), hooks=Hooks(on_step=lambda step, *_: steps.append(step)))
        return [epoch.train_loss for epoch in epochs], max(steps), len(forwards)

    whole, pieces = run(10_000), run(20)
    assert whole[0] == pytest.approx(pieces[0], abs=1e-4)
    assert whole[1] == pieces[1] == 12
    assert pieces[2] > whole[2]


def test_pieces_hold_every_row_once_in_order_within_the_budget() -> None:
    lengths = [10, 20, 30, 40, 50, 60, 70, 80]
    rows = list(range(8))
    assert cut(rows, lengths, 10_000) == [rows]
    for budget in (30, 100, 320, 639):
        pieces = cut(rows, lengths, budget)
        assert [row for piece in pieces for row in piece] == rows
    assert [len(piece) for piece in cut(rows, lengths, 320)] == [4, 4]
    assert [len(piece) for piece in cut(rows, lengths, 30)] == [1] * 8


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_a_row_counts_by_its_weight(bench: Make, tmp_path: Path, loss: str) -> None:
    """The loss of an epoch in one step is the weighted mean of the rows' losses before it."""
    made = bench(**EXACT, loss=loss, epochs=1, train_batch_size=48)
    # One label counts twice and the other not at all, so that the loss is another than the plain mean.
    given = (2 * made.data.train.targets[:, 0]).astype(np.float32)
    weighted = replace(made, data=replace(made.data, train=replace(made.data.train, weights=given)))
    model = made.model()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    logits = torch.from_numpy(made.predict(model, "train").logits)
    of_row = loss_function(made.config, reduction="none")(logits, torch.from_numpy(made.data.train.targets))
    wanted = (of_row.reshape(len(given), -1).mean(1).numpy() * given).mean()
    epochs = weighted.fit(model, tmp_path)
    assert epochs[0].train_loss == pytest.approx(float(wanted), rel=1e-3)
    assert float(wanted) != pytest.approx(of_row.mean().item(), rel=1e-3)


def test_balanced_weights_are_scikit_learns_and_leave_validation_alone() -> None:
    targets = np.eye(3, dtype=np.float32)[[0] * 6 + [1] * 3 + [2]]
    loss = loss_function(make_config("fast", class_weights="balanced"), targets)
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=targets.argmax(1))
    assert loss.weight.tolist() == pytest.approx(wanted.tolist())
    several = loss_function(make_config("fast", class_weights="balanced", loss="bce"), targets)
    assert several.pos_weight.tolist() == pytest.approx([4 / 6, 7 / 3, 9])
    assert loss_function(make_config("fast", class_weights="balanced")).weight is None
    with pytest.raises(BadConfig, match="class_weights is 'heavy'"):
        make_config("fast", class_weights="heavy")


def test_balanced_weights_make_a_rare_label_count(bench: Make, tmp_path: Path) -> None:
    made = bench(**EXACT, epochs=1)
    rare = made.data.train.targets[:, 1] == 1
    few = np.flatnonzero(rare)[:4].tolist() + np.flatnonzero(~rare).tolist()
    targets = made.data.train.targets[few]
    logits = torch.zeros(len(few), 2, requires_grad=True)
    for balanced in (None, "balanced"):
        config = make_config("fast", class_weights=balanced)
        logits.grad = None
        loss_function(config, targets)(logits, torch.from_numpy(targets)).backward()
        pull = logits.grad.sum(0)  # towards the common label, or towards none
        assert (pull.abs().max() < 1e-6) == (balanced == "balanced")


def test_training_stops_when_the_best_epoch_lies_back_and_stays_stopped(bench: Make, tmp_path: Path) -> None:
    """Validation labels turned round: the first epochs are the best there are."""
    made = bench(pooling="mean", learning_rate=1e-2, epochs=20, early_stopping_patience=2)
    turned = replace(made.data.valid, targets=1 - made.data.valid.targets)
    told: list[tuple[int, int]] = []
    hooks = Hooks(on_step=lambda step, total, *_: told.append((step, total)))
    epochs = made.fit(made.model(), tmp_path, valid=turned, hooks=hooks)
    best = max(epochs, key=lambda epoch: epoch.valid_f1_macro).epoch
    assert len(epochs) == best + 2 < 20
    assert told[0] == (0, 120)
    assert told[-1] == (6 * len(epochs), 6 * len(epochs))  # whoever watches sees it is done
    assert made.fit(made.model(), tmp_path, valid=turned) == epochs  # begun again, not one epoch more


def test_patience_counts_from_the_best_epoch() -> None:
    config = make_config("fast", early_stopping_patience=2)
    history = [{"valid_f1_macro": value} for value in (0.5, 0.7, 0.6, 0.7)]
    assert [out_of_patience(history[:n], config) for n in range(5)] == [False, False, False, False, True]
    assert not out_of_patience(history, make_config("fast"))


def test_half_precision_is_what_the_device_has() -> None:
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    cpu = torch.device("cpu")
    assert half_precision(cpu, "auto") == ("avx512_bf16" in flags or "amx_bf16" in flags)
    assert (half_precision(cpu, "bfloat16"), half_precision(cpu, "float32")) == (True, False)
    assert half_precision(torch.device("mps"), "auto") is False


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float32", torch.float32)])
def test_precision_is_of_what_is_computed_and_the_weights_stay_float32(
    bench: Make, tmp_path: Path, precision: str, dtype: torch.dtype
) -> None:
    made = bench(pooling="pooler", precision=precision, learning_rate=1e-2, epochs=3)
    model, seen = made.model(), set()
    model.bert.pooler.dense.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    epochs = made.fit(model, tmp_path)
    assert dtype in seen
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert epochs[-1].train_loss < epochs[0].train_loss


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "sgd"])
@pytest.mark.parametrize("schedule", ["step", "linear", "cosine", "constant"])
def test_optimizers_and_schedules_go_by_name(bench: Make, optimizer: str, schedule: str) -> None:
    made = bench(optimizer=optimizer, schedule=schedule, warmup_ratio=0.2, epochs=2)
    built = build_optimizer(made.model(), made.config)
    scheduler = build_scheduler(built, made.config, 10)
    rates = []
    for _ in range(20):
        rates.append(built.param_groups[0]["lr"])
        built.step()
        scheduler.step()
    assert type(built).__name__.lower() == optimizer
    peak = made.config.learning_rate
    if schedule in ("linear", "cosine"):
        assert rates[0] == 0
        assert rates[4] == max(rates) == peak
        assert rates[-1] < 0.1 * peak
    else:
        assert rates == pytest.approx([peak] * 20 if schedule == "constant" else [peak] * 10 + [0.75 * peak] * 10)


def test_tensorboard_shows_rate_validation_confusion_and_hyper_parameters(bench: Make, tmp_path: Path) -> None:
    made = bench(epochs=2)
    made.fit(made.model(), tmp_path)
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={IMAGES: 0}).Reload()
    rates = [event.value for event in events.Scalars("learning rate")]
    assert len(rates) == 12
    assert max(rates) == pytest.approx(made.config.learning_rate)
    for name in ("validation accuracy", "validation f1 macro", "epoch loss"):
        assert [event.step for event in events.Scalars(name)] == [6, 12]
    assert [event.step for event in events.Images("confusion")] == [6, 12]
    assert "_hparams_/session_start_info" in events.summary_metadata
    assert events.Scalars("kept/valid_f1_macro")


def test_a_run_stopped_between_accumulated_steps_goes_on_to_the_same_end(bench: Make, tmp_path: Path) -> None:
    made = bench(pooling="mean", learning_rate=1e-2, gradient_accumulation_steps=2, train_batch_size=8)
    unbroken = made.fit(made.model(), tmp_path / "unbroken")
    with pytest.raises(StopRequested):
        made.fit(made.model(), tmp_path / "broken", hooks=stop_at(4, validating=False))
    resumed = made.fit(made.model(), tmp_path / "broken")
    figures: list[list[Any]] = [[(e.train_loss, e.valid_loss) for e in run] for run in (unbroken, resumed)]
    assert np.allclose(figures[0], figures[1], atol=1e-4)
