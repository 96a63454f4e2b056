"""Out-of-memory errors of all libraries as one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from training import failpoint
from worker.errors import DeviceFull

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "bad_alloc", "bad allocation", "cannot allocate memory")


@contextmanager
def device_full(engine: str, release: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Convert every library's out-of-memory error to `DeviceFull`, after a call of `release`."""
    try:
        failpoint.passing("device")
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            release()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise DeviceFull(f"{engine} has no memory left for a batch this large") from error
        raise
