"""What a row costs that a teacher has labelled, and which predicted labels are trained on again."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training_loop import CPU, Bench, maker
from training.loop.checkpoints import Checkpoints
from training.loop.fit import Hooks, fit
from training.loop.logits import logits_of
from training.loop.pseudo_labels import MOST_SHARE, choose_rows, row_weights
from training.loop.soft_targets import SoftTargets
from training.loop.speed import Timed, rows_per_second


@pytest.fixture
def make(tiny_encoder: Path, labelled_csv: Path) -> Callable[..., Bench]:
    return maker(tiny_encoder, labelled_csv)


def soft_of(probabilities: list[list[float]], shares: list[float], temperature: float) -> SoftTargets:
    return SoftTargets(torch.tensor(probabilities), torch.tensor(shares), temperature)


def test_the_loss_of_a_row_is_that_of_its_label_and_of_its_teacher_by_their_shares() -> None:
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 1.0, -3.0], [1.0, 1.0, 4.0]])
    labels, teacher = np.eye(3), np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.2, 0.3, 0.5]])
    shares, temperature = np.array([0.25, 1.0, 0.0]), 3.0

    def log_softmax(values: np.ndarray) -> np.ndarray:
        return values - np.log(np.exp(values).sum(axis=1, keepdims=True))

    hard = -(labels * log_softmax(logits)).sum(axis=1)
    soft = -(teacher * log_softmax(logits / temperature)).sum(axis=1)
    expected = (1 - shares) * hard + shares * temperature**2 * soft

    # The rows of the teacher are in another order than those of the batch.
    index = [2, 0, 1]
    order = [1, 2, 0]  # of the batch's rows in the teacher's
    targets = soft_of(teacher[order].tolist(), shares[order].tolist(), temperature)
    given, loss_of = torch.tensor(logits, dtype=torch.float32), torch.nn.CrossEntropyLoss(reduction="none")
    own = loss_of(given, torch.tensor(labels, dtype=torch.float32))
    assert targets.mix(own, given, torch.tensor(index), loss_of).numpy() == pytest.approx(expected, rel=1e-5)


def test_a_higher_temperature_does_not_weaken_the_gradient() -> None:
    """For small logits it is (z - v) / K whatever the temperature, as in the paper."""
    student, teacher = torch.tensor([[0.02, -0.01, -0.01]]), torch.tensor([[-0.01, 0.03, -0.02]])
    loss_of = torch.nn.CrossEntropyLoss(reduction="none")
    gradients = []
    for temperature in (1.0, 5.0, 20.0):
        probabilities = (teacher / temperature).softmax(dim=1).tolist()
        given = student.clone().requires_grad_()
        loss = soft_of(probabilities, [1.0], temperature).mix(torch.zeros(1), given, torch.tensor([0]), loss_of)
        loss.sum().backward()
        gradients.append(given.grad)
    for gradient in gradients:
        assert gradient == pytest.approx((student - teacher) / 3, abs=3e-4)


def test_fit_learns_the_teachers_labels_where_a_row_has_no_own(make: Callable[..., Bench], tmp_path: Path) -> None:
    """The teacher says the opposite of every label, and has the whole loss."""
    bench = make(epochs=3, learning_rate=5e-3, pooling="mean")
    valid = replace(bench.data.valid, targets=np.ascontiguousarray(bench.data.valid.targets[:, ::-1]))
    turned = np.ascontiguousarray(bench.data.train.targets[:, ::-1]) * 0.9 + 0.05
    soft = SoftTargets(torch.tensor(turned, dtype=torch.float32), torch.ones(len(turned)), 2.0)
    inputs = replace(bench.inputs(valid), soft=soft)
    model = bench.model()
    fit(
        model, inputs, device=CPU, board_folder=tmp_path / "board", checkpoints=Checkpoints(tmp_path / "checkpoints"),
        hooks=Hooks(),
    )  # fmt: skip
    chosen = bench.predict(model, "train").probabilities.argmax(axis=1)
    assert (chosen == turned.argmax(axis=1)).mean() > 0.9


def test_dropout_changes_the_logits_and_nothing_else_of_the_model(make: Callable[..., Bench]) -> None:
    bench = make(head="guide", loss="bce")
    model, rows, pad_id = bench.model(), bench.rows["train"], bench.tokenizer.pad_token_id
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = logits_of(model, rows, pad_id, CPU)
    assert plain == pytest.approx(bench.predict(model, "train").logits, abs=1e-5)
    torch.manual_seed(1)
    one = logits_of(model, rows, pad_id, CPU, dropout=True)
    other = logits_of(model, rows, pad_id, CPU, dropout=True)
    torch.manual_seed(1)
    assert np.array_equal(one, logits_of(model, rows, pad_id, CPU, dropout=True))
    assert not np.allclose(one, other)
    assert not np.allclose(one, plain)
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())  # BatchNorm too


def rows_with(*of_label: tuple[int, list[float]]) -> np.ndarray:
    """Probabilities of three labels: for each label, rows of these certainties."""
    rows = []
    for label, certainties in of_label:
        for certainty in certainties:
            row = [(1 - certainty) / 2] * 3
            row[label] = certainty
            rows.append(row)
    return np.array(rows, np.float32)


def test_no_label_floods_the_chosen_rows_and_the_most_certain_are_taken() -> None:
    many = np.linspace(0.81, 0.99, 400).tolist()
    probabilities = rows_with((0, many), (1, [0.9] * 40), (2, [0.85] * 30), (2, [0.7] * 500))
    shares = np.array([0.3, 0.4, 0.3], np.float32)
    chosen = choose_rows(probabilities, 0.8, shares)
    labels = probabilities[chosen].argmax(axis=1)
    counts = np.bincount(labels, minlength=3)
    assert (counts[1], counts[2]) == (40, 30)  # all that are certain
    assert counts[0] == pytest.approx(MOST_SHARE * 0.3 * counts.sum(), abs=1)
    assert sorted(chosen[labels == 0]) == list(range(400 - counts[0], 400))
    assert list(chosen) == sorted(chosen)


def test_nothing_is_chosen_when_one_of_two_labels_has_no_certain_row() -> None:
    assert len(choose_rows(np.array([[0.9, 0.1]] * 50, np.float32), 0.8, np.array([0.5, 0.5], np.float32))) == 0
    assert len(choose_rows(np.array([[0.6, 0.4]] * 50, np.float32), 0.8, np.array([0.5, 0.5], np.float32))) == 0


def test_the_weights_of_predicted_labels_follow_their_certainty_and_never_outweigh_the_labelled_rows() -> None:
    probabilities = rows_with((0, [1.0] * 100), (1, [0.8] * 100), (2, [1 / 3] * 10))
    weights = row_weights(probabilities, labelled=1_000, factor=1.0)
    assert weights == pytest.approx([1.0] * 100 + [0.7] * 100 + [0.0] * 10, abs=1e-6)
    few = row_weights(probabilities, labelled=20, factor=0.5)
    assert few.sum() == pytest.approx(10, rel=1e-5)
    assert few == pytest.approx(weights * 10 / 170, rel=1e-4)
    assert row_weights(probabilities[:0], labelled=20, factor=0.5).shape == (0,)


def test_a_larger_model_is_slower(make: Callable[..., Bench]) -> None:
    bench = make()
    timed = Timed(bench.model(), bench.rows["test"], bench.tokenizer.pad_token_id)
    longer = Timed(timed.model, [row * 8 for row in bench.rows["test"]], timed.pad_id)
    speeds = rows_per_second({"short": timed, "long": longer}, CPU)
    assert speeds["short"] > speeds["long"] > 0
