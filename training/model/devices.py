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


def claim_device(
    wanted: str,
    folder: Path,
    kind: str,
    found: Callable[[], Sequence[str]] = gpus,
    free: Callable[[torch.device], int] | None = None,
) -> str:
    """A device for a process of this `kind`, as torch names it, until the process ends.

    With `auto` and `cuda` a process takes the first GPU that no other process of its kind has; locks in `folder`, which
    the processes of this machine share, mark the taken ones. If none is left, the process shares the GPU with the most
    free memory and logs a warning. A device given by its name is not locked, and neither is a CPU.
    """
    uuids = found() if wanted in ("auto", "cuda") else []
    if not uuids:
        return wanted
    number = _lock_first(uuids, folder, kind)
    if number is None:
        measure = free or free_bytes
        number = max(range(len(uuids)), key=lambda number: measure(torch.device("cuda", number)))
        log.warning("every GPU has a %s worker already; sharing cuda:%d", kind, number)
    return f"cuda:{number}"


def _lock_first(uuids: Sequence[str], folder: Path, kind: str) -> int | None:
    """Lock the first GPU that no process of this kind has; its number, None when all are taken.

    The file stays open: the lock is gone when the process ends.
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
