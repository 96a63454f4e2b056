"""What computes: the device somebody wants, a GPU that no other process has, and how much memory is free on either."""

import fcntl
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch

from training.errors import BadConfig

log = logging.getLogger(__name__)

CGROUP = Path("/sys/fs/cgroup")


def pick_device(wanted: str) -> torch.device:
    """`auto` takes the GPU if there is one; raises `BadConfig` for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadConfig(f"device {wanted!r} cannot be used here; use auto or cpu") from error
    return device


def gpus() -> list[str]:
    """The UUIDs of the GPUs this process sees, in the order of their numbers."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def claim_devices(
    wanted: str,
    count: int,
    folder: Path,
    kind: str,
    found: Callable[[], Sequence[str]] = gpus,
    free: Callable[[torch.device], int] | None = None,
) -> list[str]:
    """`count` devices for a process of this `kind`, named as torch names them, until the process ends.

    Where GPUs are to be taken as they come (`auto`, `cuda`), each process takes those no other of its kind has; they
    are told apart by locks in `folder`, which processes of this machine share. One that finds none left shares the one
    with the most memory free, and says so. A device that was named is taken whoever has it; CPUs are for all.

    Raises `BadConfig` when a process wants several GPUs and there are not so many.
    """
    uuids = found() if wanted in ("auto", "cuda") else []
    if not uuids:
        if count > 1 and pick_device(wanted).type != "cpu":
            raise BadConfig(f"{count} processes train on {count} GPUs, and {wanted!r} names one; use auto or cpu")
        return [wanted] * count
    locks = _lock(uuids, count, folder, kind)
    numbers = list(locks)
    if len(numbers) < count and count > 1:
        for descriptor in locks.values():
            os.close(descriptor)
        raise BadConfig(
            f"{count} processes train on {count} GPUs, and only {len(numbers)} of the {len(uuids)} here are without a "
            f"{kind} worker; set TWEETSCORE_TRAIN_PROCESSES to what is left"
        )
    if not numbers:
        measure = free or free_bytes
        roomiest = max(range(len(uuids)), key=lambda number: measure(torch.device("cuda", number)))
        log.warning("every GPU has a %s worker already; sharing cuda:%d", kind, roomiest)
        numbers = [roomiest]
    return [f"cuda:{number}" for number in numbers]


def _lock(uuids: Sequence[str], count: int, folder: Path, kind: str) -> dict[int, int]:
    """The first `count` GPUs nobody of this kind has, or as many as there are, each with the open file that is the
    claim: closed, or its process ended, it is nobody's."""
    folder.mkdir(parents=True, exist_ok=True)
    locks: dict[int, int] = {}
    for number, uuid in enumerate(uuids):
        if len(locks) == count:
            break
        descriptor = os.open(folder / f"{kind}-{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        locks[number] = descriptor
    return locks


def free_bytes(device: torch.device) -> int:
    """Memory this process could still take: the GPU's, what torch keeps for reuse included; or the machine's."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return free_memory()


def free_memory(cgroup: Path = CGROUP) -> int:
    """Of the machine, or of the container that has less: what the kernel could give, its file cache included."""
    available = int(psutil.virtual_memory().available)
    try:
        most = (cgroup / "memory.max").read_text().strip()
        held = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available  # no container, or one of the older kind
    if most == "max":
        return available
    return max(0, min(available, int(most) - held + int(stat.get("inactive_file", 0))))
