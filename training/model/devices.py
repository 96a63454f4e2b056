"""Choose a device, claim a GPU for a process, measure free memory, and recognise that there is too little."""

import fcntl
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

import psutil
import torch

from training import failpoint
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


def allow_cudnn_attention(allowed: bool) -> None:
    """Let torch choose cuDNN's attention on a GPU, in all threads of the process, or keep it from that.

    It is the fastest, but is prepared for every new shape of a batch: on an H200 the first pass over batches of many
    lengths took ten times as long as the second.
    """
    torch.backends.cuda.enable_cudnn_sdp(allowed)


def gpus(wanted: str = "auto") -> list[str]:
    """Return the UUIDs of the GPUs that `wanted` leaves the choice of, in the order of their numbers."""
    if wanted not in ("auto", "cuda") or not torch.cuda.is_available():
        return []
    return [str(torch.cuda.get_device_properties(number).uuid) for number in range(torch.cuda.device_count())]


def claim_device(
    wanted: str,
    folder: Path,
    kind: str,
    workers: int = 1,
    found: Callable[[str], Sequence[str]] = gpus,
    free: Callable[[torch.device], int] | None = None,
) -> str:
    """Return the name of a device for a process of this `kind`, and keep it claimed until the process ends.

    With `auto` or `cuda`, `workers` processes of a kind may claim each GPU, and a process claims the GPU with the
    fewest claims. A claim is a file lock in `folder`, which the processes of this machine share. If every GPU has all
    its claims, the process shares the one with the most free memory and logs a warning. Other devices are returned
    unchanged, without a lock.
    """
    uuids = found(wanted)
    if not uuids:
        return wanted
    number = _claim_gpu(uuids, folder, kind, workers)
    if number is None:
        measure = free or free_bytes
        number = max(range(len(uuids)), key=lambda number: measure(torch.device("cuda", number)))
        log.warning(
            "every GPU already has its %d %s workers; sharing cuda:%d, beyond the memory that is meant for them",
            workers, kind, number,
        )  # fmt: skip
    return f"cuda:{number}"


def claims_held(folder: Path, kind: str) -> int:
    """Return how many claims on GPUs processes of this kind hold."""
    files = list(folder.glob(f"{kind}-*.lock"))
    with _choosing(folder, kind) if files else nullcontext():
        free = [descriptor for file in files if (descriptor := _lock(file)) is not None]
        for descriptor in free:
            os.close(descriptor)
    return len(files) - len(free)


def _claim_gpu(uuids: Sequence[str], folder: Path, kind: str, workers: int) -> int | None:
    """Lock a claim on the GPU with the fewest. Returns its number; None when every claim is taken.

    The file stays open until the process ends, which releases the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _choosing(folder, kind):
        free: list[list[int]] = []  # per GPU, the claims that no other process holds, locked
        for uuid in uuids:
            names = [f"{kind}-{uuid}{f'.{claim}' if claim > 1 else ''}.lock" for claim in range(1, workers + 1)]
            free.append([descriptor for name in names if (descriptor := _lock(folder / name)) is not None])
        number = max(range(len(uuids)), key=lambda number: len(free[number]))
        chosen = free[number][:1]
        for descriptor in chain.from_iterable(free):
            if descriptor not in chosen:
                os.close(descriptor)
    return number if chosen else None


@contextmanager
def _choosing(folder: Path, kind: str) -> Iterator[None]:
    """One process of a kind chooses at a time: several that start together would count the same claims."""
    descriptor = os.open(folder / f"{kind}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int | None:
    """Return the open file, locked; None when another process holds the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def bound_memory(device: torch.device, share: float) -> None:
    """Let torch allocate at most this share of a GPU's memory in this process; more raises its out-of-memory error.

    The CUDA context, about half a gigabyte, does not count. Other devices have no bound.
    """
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(share, device)


def memory_share(device: torch.device) -> float:
    """Return the share of a GPU's memory that this process may use, and 1 for other devices."""
    return float(torch.cuda.get_per_process_memory_fraction(device)) if device.type == "cuda" else 1.0


def answers(device: torch.device) -> bool:
    """Return whether a device still computes. After some faults of a GPU nothing in the process can use it again."""
    try:
        failpoint.passing("answering")
        return float(torch.ones(2, device=device).sum()) == 2
    except RuntimeError:
        return False


def is_out_of_memory(error: Exception) -> bool:
    """Return whether a device, or the machine, is out of memory. Libraries have no common error for it."""
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY)


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can still allocate: on the GPU, including torch's cache, or on the machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved, allocated = torch.cuda.memory_reserved(device), torch.cuda.memory_allocated(device)
        return within_share(free, total, reserved, allocated, memory_share(device))
    return free_memory()


def within_share(free: int, total: int, reserved: int, allocated: int, share: float) -> int:
    """Return the bytes that a process can still allocate on a GPU of which it may use a share.

    `reserved` bytes are the process's own, and `allocated` of them are in use.
    """
    return max(0, min(free + reserved, int(share * total)) - allocated)


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
