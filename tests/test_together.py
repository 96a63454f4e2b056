"""One model trained by two processes: gloo on CPUs here, the same path as NCCL on GPUs."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from tests.conftest import wait_until
from tests.test_training import Bench, maker
from training import launch
from training.checkpoint import Checkpoints
from training.errors import Cancelled, CannotSave, StopRequested, TeamBroken
from training.fit import Fitted, Hooks
from training.launch import fit_on
from training.model import Classifier

# Nothing is drawn at random, and every sum is a long one.
EXACT = {"dropout": 0.0, "precision": "float32", "schedule": "constant", "epochs": 2}
TWO = ["cpu", "cpu"]
Make = Callable[..., Bench]


@pytest.fixture
def bench(tiny_encoder: Path, labelled_csv: Path, tmp_path: Path) -> Make:
    """As `test_training`'s, of an encoder that draws nothing at random."""
    still = tmp_path / "encoder"
    still.mkdir()
    for path in tiny_encoder.iterdir():
        text = path.read_bytes()
        if path.name == "config.json":
            text = text.replace(b'_dropout_prob": 0.1', b'_dropout_prob": 0.0')
        (still / path.name).write_bytes(text)
    return maker(still, labelled_csv)


@pytest.fixture(autouse=True)
def _nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Neither a process nor a file; the folder's name is short, as a socket's address has to be."""
    before = set(psutil.Process().children(recursive=True))
    with tempfile.TemporaryDirectory() as temporary:
        monkeypatch.setenv("TMPDIR", temporary)
        monkeypatch.setattr(tempfile, "tempdir", temporary)
        yield
        wait_until(lambda: set(psutil.Process().children(recursive=True)) <= before)
        assert list(Path(temporary).rglob("*")) == []


def trained(made: Bench, folder: Path, devices: list[str], hooks: Hooks | None = None) -> tuple[Fitted, Classifier]:
    model = made.model()
    fitted = fit_on(
        devices, model, made.inputs(), checkpoints=Checkpoints(folder / "checkpoints"),
        board_folder=folder / "board", hooks=hooks or Hooks(),
    )  # fmt: skip
    return fitted, model


def losses(fitted: Fitted) -> list[list[float]]:
    return [[epoch.train_loss, epoch.valid_loss, epoch.valid_f1_macro] for epoch in fitted.history]


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        # 48 rows in batches of 10 leave one of 8. To SGD, unlike AdamW, the gradient's size counts.
        ("fast", {"train_batch_size": 10, "gradient_accumulation_steps": 2, "optimizer": "sgd"}),
        # BatchNorm, and a last batch of two rows.
        ("guide", {"train_batch_size": 46, "optimizer": "sgd"}),
    ],
    ids=["linear head", "the guide's head"],
)
def test_two_processes_train_as_one_does(bench: Make, tmp_path: Path, preset: str, settings: dict[str, Any]) -> None:
    made = bench(preset, **EXACT, **settings, learning_rate=1.0)
    told: dict[int, list[Any]] = {1: [], 2: []}

    def run(devices: list[str]) -> tuple[Fitted, Classifier]:
        heard = told[len(devices)].append
        hooks = Hooks(
            on_resume=lambda progress: heard(("resume", progress.step)),
            on_step=lambda step, total, loss, rate: heard(("step", step, total)),
            on_epoch=lambda epoch: heard(("epoch", epoch.epoch)),
        )
        return trained(made, tmp_path / str(len(devices)), devices, hooks)

    (one, alone), (two, together) = run(["cpu"]), run(TWO)
    assert np.allclose(losses(one), losses(two), atol=1e-4)
    assert one.history[0].train_loss != pytest.approx(one.history[1].train_loss, abs=1e-3), "something was learned"
    assert told[1] == told[2]
    untouched = made.model().state_dict()
    for name, weight in alone.state_dict().items():
        assert torch.allclose(weight.float(), together.state_dict()[name].float(), atol=1e-3), name
    assert any(not torch.allclose(together.state_dict()[name], weight) for name, weight in untouched.items())
    assert list((tmp_path / "2" / "board").glob("events*"))


def test_a_run_is_handed_from_one_process_to_two_and_back(
    bench: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = bench(**EXACT, train_batch_size=8)
    unbroken, _ = trained(made, tmp_path / "unbroken", ["cpu"])
    began: list[int] = []

    def until(last: int) -> Hooks:
        def stop(step: int, *_: object) -> None:
            if step == last:
                raise StopRequested

        return Hooks(on_resume=lambda at: began.append(at.step), on_step=stop)

    with pytest.raises(StopRequested):
        trained(made, tmp_path / "broken", ["cpu"], until(4))
    torn = tmp_path / "broken" / "checkpoints" / "step-00000005-0000"
    torn.mkdir()
    with pytest.raises(StopRequested):
        trained(made, tmp_path / "broken", TWO, until(8))
    assert f"checkpoint {torn.name} cannot be used" in caplog.text, "what the leader logs is logged here"
    ended, _ = trained(made, tmp_path / "broken", ["cpu"], until(1000))
    assert began == [0, 4, 8]
    assert np.allclose(losses(unbroken), losses(ended), atol=1e-4)


def test_what_is_drawn_at_random_is_the_same_after_a_stop(
    tiny_encoder: Path, labelled_csv: Path, tmp_path: Path
) -> None:
    made = maker(tiny_encoder, labelled_csv)(dropout=0.5, epochs=1, precision="float32")
    stops = iter(range(1000))

    def stop(step: int, *_: object) -> None:
        if step == 3 and next(stops) == 0:
            raise StopRequested

    with pytest.raises(StopRequested):
        trained(made, tmp_path / "broken", TWO, Hooks(on_step=stop))
    resumed, unbroken = trained(made, tmp_path / "broken", TWO)[0], trained(made, tmp_path / "unbroken", TWO)[0]
    assert np.allclose(losses(unbroken), losses(resumed), atol=1e-5)


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on_from_its_checkpoint(
    bench: Make, tmp_path: Path
) -> None:
    made = bench(**EXACT)

    def kill(epoch: Any) -> None:
        members = [child for child in psutil.Process().children(recursive=True) if "training.member" in child.cmdline()]
        members = [child for child in members if "accelerate.commands.launch" not in child.cmdline()]
        assert len(members) == 2
        every = psutil.Process().children(recursive=True)
        listening = [each for child in every for each in child.net_connections("inet") if each.status == "LISTEN"]
        assert {each.laddr.ip for each in listening} == {"127.0.0.1"}, "nobody else can speak to them"
        next(child for child in members if child.environ()["RANK"] == "1").kill()

    with pytest.raises(TeamBroken, match="ended from outside"):
        trained(made, tmp_path, TWO, Hooks(on_epoch=kill))
    resumed: list[int] = []
    fitted, _ = trained(made, tmp_path, ["cpu"], Hooks(on_resume=lambda at: resumed.append(at.epoch)))
    assert resumed == [2]
    assert len(fitted.history) == 2


def test_a_hook_that_raises_ends_all_at_once(bench: Make, tmp_path: Path) -> None:
    def cancel(step: int, *_: object) -> None:
        raise Cancelled

    with pytest.raises(Cancelled):
        trained(bench(**EXACT), tmp_path, TWO, Hooks(on_step=cancel))


def test_what_a_process_raises_is_raised_here(bench: Make, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("no folder")
    with pytest.raises(CannotSave, match="could not be written"):
        trained(bench(**EXACT), tmp_path, TWO)


def test_processes_that_do_not_start_say_why(bench: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_command", lambda *_: ["python3", "-c", "raise ImportError('no NCCL here')"])
    with pytest.raises(TeamBroken, match="did not start: ImportError: no NCCL here"):
        trained(bench(**EXACT), tmp_path, TWO)


def test_processes_see_the_gpus_that_were_claimed_of_those_that_are_seen_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert launch._environment(["cuda:1", "cuda:3"])["CUDA_VISIBLE_DEVICES"] == "1,3"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-5e,6,7")
    assert launch._environment(["cuda:1", "cuda:3"])["CUDA_VISIBLE_DEVICES"] == "GPU-5e,7"
    assert "CUDA_VISIBLE_DEVICES" not in launch._environment(TWO)
