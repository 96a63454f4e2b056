"""GPUs are told apart, and a process keeps to its share of one."""

import pytest
import torch

from tests.support.actors import FORKS
from training.model.devices import bound_memory, free_bytes, gpus, pick_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]
SHARE = 0.05
SLACK_BYTES = 64 << 20  # the allocator rounds up


def test_gpus_are_told_apart_and_have_memory() -> None:
    assert len(set(gpus())) == torch.cuda.device_count()
    assert pick_device("auto").type == "cuda"
    assert 0 < free_bytes(torch.device("cuda:0")) <= torch.cuda.get_device_properties(0).total_memory


def test_a_process_gets_its_share_of_the_memory_and_an_error_beyond() -> None:
    # In another process: a bound stays until the process ends, and a fork cannot use CUDA.
    with FORKS.Pool(1) as pool:
        free, allowed, refused = pool.apply(_fill)
    total = torch.cuda.get_device_properties(0).total_memory
    assert 0 < free <= SHARE * total
    assert (allowed, refused) == (True, True)


def _fill() -> tuple[int, bool, bool]:
    device = torch.device("cuda", 0)
    bound_memory(device, SHARE)
    free = free_bytes(device)
    kept = torch.empty(free - SLACK_BYTES, dtype=torch.uint8, device=device)
    allowed = free_bytes(device) <= SLACK_BYTES
    try:
        torch.empty(2 * SLACK_BYTES, dtype=torch.uint8, device=device)
    except torch.cuda.OutOfMemoryError:
        return free, allowed and len(kept) > 0, True
    return free, allowed, False
