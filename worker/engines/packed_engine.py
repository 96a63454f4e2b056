"""The engines of a GPU: tweets packed into rows of a fixed length, replayed as CUDA graphs.

A short tweet is little work for a GPU, so padding and the launches of kernels cost more than the products. Packed rows
have almost no padding, and few shapes; a graph launches all kernels of a shape at once. On a CPU the same code runs
without graphs.
"""

import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from training.model.batching import Batch, Logits
from training.model.classifier import Classifier
from training.model.devices import allow_cudnn_attention
from training.model.packed_network import PackedNetwork
from training.model.packing import ROW_TOKENS, pack, plan_rows
from worker.engines.device_errors import device_full

# Heights of batches are multiples of this part of the highest, or smaller powers of 2, so that there are few shapes.
HEIGHTS, LOWEST = 8, 8
WARM_UPS = 2

Shape = tuple[int, ...]


class PackedEngine:
    """A `PackedNetwork` in `dtype`. KIND in the name KIND-DTYPE:

    `packed` masks the other texts of a row, `varlen` uses torch's attention for texts of any length, and `compiled` is
    `packed` with norms by `torch.compile`, which needs a C compiler.
    """

    def __init__(self, kind: str, model: Classifier, device: torch.device, dtype: torch.dtype) -> None:
        self.name = f"{kind}-{str(dtype).removeprefix('torch.')}"
        self._pad_id: int = model.encoder_config.pad_token_id or 0
        self._device = device
        network = PackedNetwork(model, varlen=kind == "varlen").to(device, dtype)
        if kind == "compiled":
            _compile_norms(network)
        self._network: Callable[..., Tensor] = network
        self._submitting = threading.Lock()
        self._graphs: dict[Shape, _Graph] = {}
        self._pool: Any = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    def batches(self, rows: Sequence[Sequence[int]], token_budget: int) -> list[Batch]:
        """Batches with the arrays of `PackedRows`. Longer texts go to longer rows, which come first."""
        by_size = defaultdict(list)
        for number, row in enumerate(rows):
            by_size[max(1, ceil(len(row) / ROW_TOKENS)) * ROW_TOKENS].append(number)
        batches = []
        for size, numbers in sorted(by_size.items(), reverse=True):
            plan = [[numbers[i] for i in row] for row in plan_rows([len(rows[i]) for i in numbers], size)]
            highest = max(1, token_budget // size)
            for start in range(0, len(plan), highest):
                part = plan[start : start + highest]
                height = _height(len(part), highest)
                packed = pack(rows, part, height, self._pad_id, size)
                arrays = (packed.ids, packed.positions, packed.texts, packed.first, packed.slots)
                batches.append(Batch(arrays, [i for row in part for i in row], height * size, height > 1))
        return batches

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        with device_full(self.name, self._graphs.clear):
            if self._device.type != "cuda":
                inputs = [list(map(torch.from_numpy, batch.arrays)) for batch in batches]
                return [self._network(*arrays)[slots].float().numpy() for *arrays, slots in inputs]
            with self._submitting:  # the inputs of a graph are those of one batch at a time
                found = [self._submit(batch) for batch in batches]
                # Blocking: a thread that waits leaves its core to others, of other scorers too.
                done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                done.record(torch.cuda.current_stream(self._device))
            done.synchronize()  # waits for these batches, not for those of another thread
            return [logits.numpy() for logits in found]

    def _submit(self, batch: Batch) -> Tensor:
        """Start a batch. Returns its logits (N, K) in pinned memory, valid once the stream has come so far."""
        *arrays, slots = (torch.from_numpy(array).pin_memory() for array in batch.arrays)
        shape = batch.arrays[0].shape
        graph = self._graphs.get(shape)
        if graph is None:
            graph = self._graphs[shape] = _Graph(self._network, arrays, self._device, self._pool)
        logits = graph.run(arrays)[slots.to(self._device, non_blocking=True)].float()
        # The cache of pinned memory keeps a block until the copies that use it have ended.
        return torch.empty(logits.shape, pin_memory=True).copy_(logits, non_blocking=True)


def _height(rows: int, highest: int) -> int:
    """Of a batch with so many rows, the next that there are shapes for."""
    step = max(1, highest // HEIGHTS)
    if rows > step // 2:
        return min(highest, ceil(rows / step) * step)
    return max(min(LOWEST, step), 1 << (rows - 1).bit_length())


def _compile_norms(network: PackedNetwork) -> None:
    """Compile the norms of the layers, once for any number of rows.

    Torch's own kernel reaches a third of a card's memory bandwidth for rows of 768. What else no product computes is
    part of a product already.
    """
    compiled = torch.compile(functional.layer_norm)

    class CompiledNorm(nn.LayerNorm):
        def forward(self, vectors: Tensor) -> Tensor:
            torch._dynamo.maybe_mark_dynamic(vectors, 0)
            normed: Tensor = compiled(vectors, self.normalized_shape, self.weight, self.bias, self.eps)
            return normed

    for module in network.layers.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = CompiledNorm


# One capture at a time, all on the same stream: cuBLAS keeps memory for every stream that it was used on.
_CAPTURING = threading.Lock()
_capture_stream = cache(torch.cuda.Stream)


class _Graph:
    """A network captured for one shape. All graphs of a pool share their memory, as one runs at a time."""

    def __init__(
        self, network: Callable[..., Tensor], example: Sequence[Tensor], device: torch.device, pool: Any
    ) -> None:
        self._inputs = [array.to(device) for array in example]
        allow_cudnn_attention(True)
        with _CAPTURING:
            side = _capture_stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):  # kernels are chosen, compiled and loaded before the capture
                    network(*self._inputs)
            torch.cuda.current_stream(device).wait_stream(side)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads of the process may use the device meanwhile.
            with torch.cuda.graph(self._graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                self._logits = network(*self._inputs)

    def run(self, arrays: Sequence[Tensor]) -> Tensor:
        """Logits (R * M, K) on the device; they change with the next run of any graph of the pool."""
        for held, given in zip(self._inputs, arrays, strict=True):
            held.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._logits
