"""GPUs are distributed among processes (with names of GPUs that do not exist), and free memory is measured."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.support.actors import FORKS
from training.errors import BadConfig
from training.model.devices import claim_device, free_bytes, free_memory, gpus, pick_device

UUIDS = ("GPU-a", "GPU-b", "GPU-c")
FREE = (1, 3, 2)


class Taker:
    """A process that claims a device and holds it until it is ended."""

    def __init__(self, folder: Path, kind: str = "scoring", wanted: str = "auto") -> None:
        self._here, there = FORKS.Pipe()
        self._process = FORKS.Process(target=_take, args=(there, folder, kind, wanted), daemon=True)
        self._process.start()

    def has(self) -> str:
        assert self._here.poll(60)
        claimed: str = self._here.recv()
        return claimed

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def _take(there: Any, folder: Path, kind: str, wanted: str) -> None:
    there.send(claim_device(wanted, folder, kind, lambda: UUIDS, lambda device: FREE[device.index]))
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


def test_a_device_that_was_named_is_taken_and_cpus_are_for_all(tmp_path: Path) -> None:
    def claim(wanted: str, *uuids: str) -> str:
        return claim_device(wanted, tmp_path / "gpus", "scoring", lambda: uuids)

    assert claim("cuda:1", "GPU-a", "GPU-b") == "cuda:1"
    assert claim("cpu", "GPU-a") == "cpu"
    assert claim("auto") == "auto"
    assert not (tmp_path / "gpus").exists()


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU")
def test_gpus_are_told_apart_and_have_memory() -> None:
    assert len(set(gpus())) == torch.cuda.device_count()
    assert pick_device("auto").type == "cuda"
    assert 0 < free_bytes(torch.device("cuda:0")) <= torch.cuda.get_device_properties(0).total_memory
