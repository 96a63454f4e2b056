"""Engines: each runs one model on a device, from token ids to logits. They handle no texts.

An engine serves only after it agreed with float32 torch: see `engine_selection.py`.
"""

import copy
import platform
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch

from training.model.batching import Batch, Ids, Logits, padded_batches
from training.model.classifier import Classifier
from training.model.devices import allow_cudnn_attention
from training.model.packed_network import can_pack
from worker.engine_names import CPU_ENGINES, CUDA_ENGINES, FLOAT32_TORCH, PACKED
from worker.engines.device_errors import device_full
from worker.engines.packed_engine import PackedEngine
from worker.errors import EngineUnavailable

# Neighbouring activations of a token that share one int8 scale. Smaller is more exact, larger is faster; relative speed
# at BERT-base size: 64: 0.9, 128: 1.0, 256: 1.01, 768: 0.7.
ACTIVATION_GROUP = 128
INSTALL_CPU_ENGINES = "pip install openvino"


class Engine(Protocol):
    """One model, ready on its device."""

    name: str

    def batches(self, rows: Sequence[Sequence[int]], token_budget: int) -> list[Batch]:
        """Token ids of texts -> batches of about this many tokens, padding included."""
        ...

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        """Logits (N, K) float32 of the N rows of every batch. Raises `DeviceFull` when a batch does not fit.

        Two threads may call it: while one waits for its last batches, the batches of the other start.
        """
        ...


def openvino() -> Any:
    """The OpenVINO package; imported when a CPU engine is built, so that a GPU worker runs without it.

    Raises `EngineUnavailable` where it is not installed.
    """
    # OpenVINO sends usage data to its vendor unless this package is missing.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino as package
    except ImportError as error:
        raise EngineUnavailable(f"OpenVINO cannot be imported ({error}); `{INSTALL_CPU_ENGINES}`") from error
    return package


class PaddedEngine:
    """Rows of like length share a batch and are padded to the longest."""

    def __init__(self, name: str, pad_id: int | None) -> None:
        self.name = name
        self._pad_id = pad_id or 0  # any id will do: the mask hides it

    def batches(self, rows: Sequence[Sequence[int]], token_budget: int) -> list[Batch]:
        return padded_batches(rows, token_budget, self._pad_id)


class TorchEngine(PaddedEngine):
    """PyTorch in `dtype`, with fused attention. All batches are submitted before the first result is awaited."""

    def __init__(self, model: Classifier, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(f"torch-{str(dtype).removeprefix('torch.')}", model.encoder_config.pad_token_id)
        self._device = device
        self._pinned = device.type == "cuda"
        self._model = model.to(device=device, dtype=dtype).eval()

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        allow_cudnn_attention(False)
        with device_full(self.name):
            logits = [self._model(*map(self._send, batch.arrays)).float() for batch in batches]
            return [part.cpu().numpy() for part in logits]

    def _send(self, array: Ids) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        # A copy from pinned memory overlaps the forward before it.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._pinned else tensor.to(self._device)


class OpenVinoEngine(PaddedEngine):
    """OpenVINO on the CPU: several batches at once, each on its own cores where that is faster."""

    def __init__(self, name: str, model: Any, precision: str, pad_id: int | None) -> None:
        super().__init__(name, pad_id)
        ov = openvino()
        compiled = ov.Core().compile_model(
            model,
            "CPU",
            {
                "PERFORMANCE_HINT": "THROUGHPUT",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "INFERENCE_PRECISION_HINT": precision,
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": ACTIVATION_GROUP,
                "ENABLE_CPU_PINNING": False,
                # By default OpenVINO keeps what it prepares for thousands of shapes: a worker, whose batches have all
                # shapes, grew by a megabyte a second. With 0 a single tweet takes a third longer.
                "CPU_RUNTIME_CACHE_CAPACITY": 100,
            },
        )
        # Twice the number that runs at once, so that a core never waits for Python to submit its next batch.
        jobs = 2 * compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # Two queues: while the last batches of one window run, the next window fills the idle cores.
        self._queues: SimpleQueue[Any] = SimpleQueue()
        for queue in (ov.AsyncInferQueue(compiled, jobs), ov.AsyncInferQueue(compiled, jobs)):
            queue.set_callback(_copy_logits)
            self._queues.put(queue)
        self._submitting = threading.Lock()

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        found: dict[int, Logits] = {}
        queue = self._queues.get()
        try:
            with device_full(self.name):
                try:
                    with self._submitting:  # keeps the batches of one call together
                        for number, batch in enumerate(batches):
                            inputs = dict(zip(("input_ids", "attention_mask"), batch.arrays, strict=True))
                            queue.start_async(inputs, (found, number), share_inputs=True)
                finally:
                    queue.wait_all()  # the arrays are shared, so they must outlive their requests
        finally:
            self._queues.put(queue)
        return [found[number] for number in range(len(batches))]


def _copy_logits(request: Any, target: tuple[dict[int, Logits], int]) -> None:
    found, number = target
    found[number] = request.get_output_tensor(0).data.copy()


class EngineBuilder:
    """Builds engines of one model on one device, by name. `graph_path` is the graph saved by an earlier build."""

    def __init__(self, model: Classifier, device: torch.device, graph_path: Path | None = None) -> None:
        self._model = model
        self._device = device
        self._graph_path = graph_path

    def names(self) -> list[str]:
        """The engines to try on this device. Float32 torch is always among them: the others are compared with it."""
        if self._device.type == "cuda":
            packed = can_pack(self._model)
            return [name for name in CUDA_ENGINES if packed or not name.startswith(PACKED)]
        if self._device.type != "cpu":
            return [FLOAT32_TORCH]
        try:
            has_bf16 = _cpu_has_bf16()
        except EngineUnavailable:
            return [CPU_ENGINES[0], FLOAT32_TORCH]  # the trial of the first one reports what is not installed
        return [name for name in CPU_ENGINES if has_bf16 or not name.endswith("bfloat16")]

    def slower(self) -> dict[str, str]:
        """Engines that cannot be the fastest on this device, with the reason; `auto` does not try them."""
        return slower_engines(torch.cpu.get_capabilities()) if self._device.type == "cpu" else {}

    def build(self, name: str) -> Engine:
        library, _, precision = name.partition("-")
        if library == "torch":
            # A copy: the rounded weights of one engine must not reach the next.
            return TorchEngine(copy.deepcopy(self._model), self._device, getattr(torch, precision))
        if library in PACKED:
            return PackedEngine(library, self._model, self._device, getattr(torch, precision))
        pad_id = self._model.encoder_config.pad_token_id
        return OpenVinoEngine(name, self.graph(name), "bf16" if precision == "bfloat16" else "f32", pad_id)

    def graph(self, name: str) -> Any:
        """The OpenVINO graph of an engine."""
        if self._graph_path is not None:
            return openvino().Core().read_model(self._graph_path)
        return self._quantised if name == "openvino-int8" else self._converted

    @cached_property
    def _quantised(self) -> Any:
        """Weights of matrix products in int8 with a scale per row; activations at run time with a scale per group.

        Embeddings stay float32: they are looked up, not multiplied, so int8 would cost agreement and gain nothing.
        """
        graph = self._converted.clone()
        for node in graph.get_ordered_ops():
            if node.get_type_name() == "MatMul" and node.get_attributes()["transpose_b"]:
                weights = node.input_value(1).get_node()
                if weights.get_type_name() == "Constant" and len(weights.shape) == 2:
                    node.input(1).replace_source_output(_quantised_rows(weights.data).output(0))
        return graph

    @cached_property
    def _converted(self) -> Any:
        """The float32 graph, for batches of any shape."""
        ov, example = openvino(), torch.ones((2, 8), dtype=torch.long)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing freezes Python values; the reference rows show if any mattered
            return ov.convert_model(self._model, example_input={"input_ids": example, "attention_mask": example})


def _quantised_rows(weights: Logits) -> Any:
    """A node that gives float32 weights (N, K) from uint8, with a scale and a zero point per row.

    OpenVINO recognises this form and multiplies with the integers.
    """
    from openvino import opset13 as opset

    # Ranges include 0, as the zero point must be one of the 256 values.
    lowest, highest = weights.min(1, keepdims=True).clip(max=0), weights.max(1, keepdims=True).clip(min=0)
    scale = np.maximum((highest - lowest) / 255, np.finfo(np.float16).tiny).astype(np.float16)
    step = scale.astype(np.float32)
    zero = (-lowest / step).round().clip(0, 255)
    levels = (weights / step + zero).round().clip(0, 255).astype(np.uint8)
    as_half = [opset.convert(opset.constant(part), "f16") for part in (levels, zero.astype(np.uint8))]
    scaled = opset.multiply(opset.subtract(*as_half), opset.constant(scale))
    return opset.convert(scaled, "f32")


def save_graph(graph: Any, path: Path) -> None:
    openvino().save_model(graph, path, compress_to_fp16=False)


def hardware(device: torch.device) -> str:
    """The description of the hardware that a choice is valid for."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    try:
        core = openvino().Core()
    except EngineUnavailable:
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, without OpenVINO"
    features = "/".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}, {torch.get_num_threads()} threads, {features}"


def slower_engines(capabilities: Mapping[str, Any]) -> dict[str, str]:
    """Engines that a CPU with these capabilities, as PyTorch names them, runs slower than another, with the reason."""
    if capabilities.get("architecture") != "x86_64":
        return {}
    if capabilities.get("amx_bf16"):
        # Measured with int8 weights under float32 and under bfloat16: 0.64 to 0.79 of the speed of plain bfloat16.
        return {"openvino-int8": "is not tried: the AMX units of this CPU are faster in bfloat16"}
    if not any(capabilities.get(name) for name in ("avx512_vnni", "avx_vnni")):
        return {"openvino-int8": "is not tried: this CPU has no int8 products (VNNI) and would compute in float32"}
    return {}


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; emulation is many times slower than float32."""
    return "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
