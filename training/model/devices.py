"""Choose a device, claim a GPU for a process, measure free memory, and recognise that there is too little."""

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
# Parts of the messages of torch, of C++ libraries and of cuBLAS.
OUT_OF_MEMORY = (
    "out of memory", "can't allocate memory", "bad_alloc", "bad allocation", "cannot allocate memory", "alloc_failed",
)  # fmt: skip


def pick_device(wanted: str) -> torch.device:
    """Return the device; `auto` is the GPU if there is one. Raises `BadConfig` for a device that cannot be used."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadConfig(f"device {wanted!r} cannot be used here; use auto or cpu") from error
    return device


def gpus() -> list[str]:
    """Return the UUIDs of the GPUs that this process sees, in the order of their numbers."""
    if not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def claim_device(
    wanted: str,
    folder: Path,
    kind: str,
    found: Callable[[], Sequence[str]] = gpus,
    free: Callable[[torch.device], int] | None = None,
) -> str:
    """Return the name of a device for a process of this `kind`, and keep it claimed until the process ends.

    With `auto` or `cuda` a process gets the first GPU that no other process of its kind has claimed. A claim is a file
    lock in `folder`, which the processes of this machine share. If all GPUs are claimed, the process shares the one
    with the most free memory and logs a warning. Other devices are returned unchanged, without a lock.
    """
    uuids = found() if wanted in ("auto", "cuda") else []
    if not uuids:
        return wanted
    number = _lock_first(uuids, folder, kind)
    if number is None:
        measure = free or free_bytes
        number = max(range(len(uuids)), key=lambda number: measure(torch.device("cuda", number)))
        log.warning("every GPU already has a %s worker; sharing cuda:%d", kind, number)
    return f"cuda:{number}"


def _lock_first(uuids: Sequence[str], folder: Path, kind: str) -> int | None:
    """Lock the first GPU that no process of this kind has locked. Returns its number; None when all are locked.

    The file stays open until the process ends, which releases the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for number, uuid in enumerate(uuids):
        descriptor = os.open(folder / f"{kind}-{uuid}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            continue
        return number
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device, or the machine, is out of memory. Libraries have no common error for it."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate: on the GPU, including torch's cache, or on the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return free_memory()


def free_memory(cgroup: Path = CGROUP) -> int:
    """Return the free bytes of the machine, or of the container if it has less. The file cache counts as free."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return available  # no container, or cgroup version 1
    if limit == "max":
        return available
    return max(0, min(available, int(limit) - used + int(stat.get("inactive_file", 0))))
