"""Out-of-memory errors of all libraries as one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from training import failpoint
from training.model.devices import is_out_of_memory
from worker.errors import DeviceFull


@contextmanager
def device_full(engine: str, release: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Convert every library's out-of-memory error to `DeviceFull`, after a call of `release`."""
    try:
        failpoint.passing("device")
        yield
    except (MemoryError, RuntimeError) as error:
        if is_out_of_memory(error):
            release()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise DeviceFull(f"{engine} has no memory left for a batch this large") from error
        raise
