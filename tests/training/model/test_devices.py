"""GPUs are distributed among processes (with names of GPUs that do not exist), and free memory is measured."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.actors import FORKS
from training.errors import BadConfig
from training.model.devices import claim_device, claims_held, free_bytes, free_memory, gpus, pick_device, within_share

UUIDS = ("GPU-a", "GPU-b", "GPU-c")
FREE = (1, 3, 2)


class Taker:
    """A process that claims a device and holds it until it is ended."""

    def __init__(self, folder: Path, kind: str = "scoring", wanted: str = "auto", workers: int = 1) -> None:
        self._here, there = FORKS.Pipe()
        self._process = FORKS.Process(target=_take, args=(there, folder, kind, wanted, workers), daemon=True)
        self._process.start()

    def has(self) -> str:
        assert self._here.poll(60)
        claimed: str = self._here.recv()
        self.has_had = claimed
        return claimed

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _take(there: Any, folder: Path, kind: str, wanted: str, workers: int) -> None:
    there.send(claim_device(wanted, folder, kind, workers, lambda _: UUIDS, lambda device: FREE[device.index]))
    there.recv()


@pytest.fixture
def taker(tmp_path: Path) -> Iterator[Callable[..., Taker]]:
    made: list[Taker] = []

    def make(*given: Any, **options: Any) -> Taker:
        made.append(Taker(tmp_path / "gpus", *given, **options))
        return made[-1]

    yield make
    for one in made:
        one.end()


def test_each_process_of_a_kind_has_a_gpu_of_its_own_and_a_killed_one_has_none(taker: Callable[..., Taker]) -> None:
    first = taker()
    assert first.has() == "cuda:0"
    assert [taker().has(), taker(wanted="cuda").has()] == ["cuda:1", "cuda:2"]
    assert taker("training").has() == "cuda:0", "trainers and scorers do not exclude each other"
    assert taker().has() == "cuda:1", "all GPUs are in use; this one has the most free memory"
    first.end()
    assert taker().has() == "cuda:0"


def test_workers_that_start_together_share_the_gpus_evenly(taker: Callable[..., Taker], tmp_path: Path) -> None:
    together = [taker(workers=2) for _ in range(6)]
    assert sorted(one.has() for one in together) == ["cuda:0", "cuda:0", "cuda:1", "cuda:1", "cuda:2", "cuda:2"]
    assert taker(workers=2).has() == "cuda:1", "beyond all claims: the one with the most free memory"
    assert claims_held(tmp_path / "gpus", "scoring") == 6
    left = next(one for one in together if one.has_had == "cuda:2")
    left.end()
    assert claims_held(tmp_path / "gpus", "scoring") == 5
    assert taker(workers=2).has() == "cuda:2"


def test_a_worker_takes_the_gpu_with_the_fewest_workers(taker: Callable[..., Taker]) -> None:
    first, second = taker(workers=3), taker(workers=3)
    assert {first.has(), second.has()} == {"cuda:0", "cuda:1"}
    first.end()
    fewest = {"cuda:0", "cuda:1", "cuda:2"} - {second.has_had}
    assert {taker(workers=3).has() for _ in range(2)} == fewest


def test_a_device_that_was_named_is_taken_and_cpus_are_for_all(tmp_path: Path) -> None:
    for wanted in ("cuda:1", "cpu"):
        assert gpus(wanted) == []
        assert claim_device(wanted, tmp_path / "gpus", "scoring") == wanted
    assert claim_device("auto", tmp_path / "gpus", "scoring", 2, lambda _: ()) == "auto"
    assert not (tmp_path / "gpus").exists()
    assert claims_held(tmp_path / "gpus", "scoring") == 0


def test_a_device_that_is_not_there_is_refused_by_its_name() -> None:
    with pytest.raises(BadConfig, match="device 'cuda:99' cannot be used here; use auto or cpu"):
        pick_device("cuda:99")


def test_free_memory_is_the_machines_or_the_containers_that_has_less(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert 0 < free_bytes(torch.device("cpu")) <= total
    assert 0 < free_memory(tmp_path / "none") <= total
    for name, text in (("memory.max", "1000"), ("memory.current", "900"), ("memory.stat", "anon 5\ninactive_file 250")):
        (tmp_path / name).write_text(text + "\n")
    assert free_memory(tmp_path) == 350
    (tmp_path / "memory.current").write_text("2000\n")
    assert free_memory(tmp_path) == 0
    (tmp_path / "memory.max").write_text("max\n")
    assert 1000 < free_memory(tmp_path) <= total


def test_a_process_may_use_its_share_of_a_gpu_and_what_is_free() -> None:
    assert within_share(free=70, total=80, reserved=6, allocated=4, share=1.0) == 72
    assert within_share(free=70, total=80, reserved=6, allocated=4, share=0.125) == 6
    assert within_share(free=1, total=80, reserved=6, allocated=4, share=0.125) == 3, "others use the rest"
    assert within_share(free=70, total=80, reserved=30, allocated=20, share=0.125) == 0
