"""This process among those that train one model, each on its device: what `accelerate launch` started, as a `Team`."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list
from torch import Tensor, nn

from training.errors import StopRequested
from training.team import Team, Value


class Together(Team):
    """GPUs speak by NCCL, CPUs by gloo; all else is the same."""

    def __init__(self, cpu: bool, meeting: Path) -> None:
        """`meeting` is a file that is not there yet, the same one for all: how they find each other."""
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not cpu:
            torch.cuda.set_device(rank)
        # Left to itself, torch has a server for this that listens on every interface.
        dist.init_process_group("gloo" if cpu else "nccl", f"file://{meeting}", rank=rank, world_size=size)
        # Not every weight is in every graph: a pooler that is loaded and not used has no gradient.
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        self._accelerator = Accelerator(cpu=cpu, kwargs_handlers=[unused])
        self.device: torch.device = self._accelerator.device
        self.rank = self._accelerator.process_index
        self.size = self._accelerator.num_processes

    def share(self, rows: list[int]) -> tuple[list[int], float]:
        if len(rows) < self.size:
            return rows, 1 / self.size  # all of them the same: a process without a row could not take part
        return rows[self.rank :: self.size], 1.0

    def sum(self, values: Tensor) -> Tensor:
        summed = values.to(self.device, copy=True)
        dist.all_reduce(summed)
        return summed.to(values.device)

    def tell(self, ask: Callable[[], Value]) -> Value:
        found: list[Any] = [None]
        failure: BaseException | None = None
        if self.leads:
            try:
                found = [(ask(),)]
            except BaseException as error:
                failure = error
        broadcast_object_list(found)
        if failure is not None:
            raise failure
        if found[0] is None:
            raise StopRequested
        value: Value = found[0][0]
        return value

    def wrap(self, model: nn.Module) -> nn.Module:
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.BatchNorm1d):
                    setattr(module, name, SharedBatchNorm.of(child))
        wrapped: nn.Module = self._accelerator.prepare_model(model)
        return wrapped

    def unsynced(self, model: nn.Module) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self._accelerator.no_sync(model)
        return context

    def begin_step(self, seed: int, step: int) -> None:
        # The leader's generator is in the checkpoint; the others' follow from where the run is, so they need not be.
        if not self.leads:
            torch.manual_seed((seed * 1_000_003 + step) * self.size + self.rank)


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm over the rows of all processes, so that a share is normalised as the whole batch would be.

    torch's own SyncBatchNorm does this on GPUs alone.
    """

    @classmethod
    def of(cls, module: nn.BatchNorm1d) -> "SharedBatchNorm":
        """The same layer, its parameters and statistics the very same tensors."""
        shared = cls(module.num_features, eps=module.eps, momentum=module.momentum)
        shared.weight, shared.bias = module.weight, module.bias
        shared.running_mean, shared.running_var = module.running_mean, module.running_var
        shared.num_batches_tracked = module.num_batches_tracked
        return shared.train(module.training)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """`input` (B, C) -> (B, C)."""
        if not self.training:
            return super().forward(input)
        rows = input.float()
        sums = torch.stack([rows.sum(0), (rows**2).sum(0), rows.new_full(rows.shape[1:], len(rows))])  # (3, C)
        total, squares, number = _Summed.apply(sums)  # type: ignore[no-untyped-call]
        mean = total / number
        variance = (squares / number - mean**2).clamp(min=0)
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)  # type: ignore[union-attr, arg-type]
        normal: Tensor = (rows - mean) * torch.rsqrt(variance + self.eps)
        return normal * self.weight + self.bias


class _Summed(torch.autograd.Function):
    """A sum over processes that gradients go back through: each gets the sum of theirs."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        summed: Tensor = gradient.clone()
        dist.all_reduce(summed)
        return summed
