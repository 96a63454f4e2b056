"""Engines: what turns padded token ids into logits on a device. Knows no texts, labels, tweets or files but its own.

Each is compared with float32 torch before it may serve: see `lineup.py`.
"""

import copy
import io
import logging
import platform
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from training import failpoint
from training.batches import Ids
from training.model import Classifier
from worker.errors import DeviceFull, EngineUnavailable

Logits = NDArray[np.float32]
Batch = tuple[Ids, Ids]  # ids (B, T) and mask (B, T), int64

# So many neighbouring activations of a token share one int8 scale. Smaller is more exact, larger is faster; measured at
# BERT-base size: 64: 0.9, 128: 1.0, 256: 1.01, 768: 0.7 times the speed.
ACTIVATION_GROUP = 128
INSTALL_CPU_ENGINES = "pip install openvino nncf"
NO_ROOM = ("out of memory", "can't allocate memory", "bad_alloc", "bad allocation", "cannot allocate memory")


class Engine(Protocol):
    """One model, ready on its device."""

    name: str

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        """Logits (B, K) float32 of every batch, in their order. Raises `DeviceFull` when one does not fit.

        Two threads may call it: while one waits for its last batches, those of the other are begun.
        """
        ...


def openvino() -> Any:
    """The OpenVINO package; imported when a CPU engine is built, so that a GPU worker runs without it.

    Raises `EngineUnavailable` where it is not installed.
    """
    # OpenVINO and NNCF report their use to their maker unless this package is missing. Nothing here phones home.
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        import openvino as package
    except ImportError as error:
        raise EngineUnavailable(f"OpenVINO cannot be imported ({error}); `{INSTALL_CPU_ENGINES}`") from error
    return package


class TorchEngine:
    """PyTorch in `dtype`, with its fused attention. All batches are handed over before any result is waited for."""

    def __init__(self, model: Classifier, device: torch.device, dtype: torch.dtype) -> None:
        self.name = f"torch-{str(dtype).removeprefix('torch.')}"
        self._device = device
        self._pinned = device.type == "cuda"
        self._model = model.to(device=device, dtype=dtype).eval()

    @torch.inference_mode()
    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        with _room(self.name):
            logits = [self._model(self._send(ids), self._send(mask)).float() for ids, mask in batches]
            return [part.cpu().numpy() for part in logits]

    def _send(self, array: Ids) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        # From pinned memory a copy goes on beside the forward before it.
        return tensor.pin_memory().to(self._device, non_blocking=True) if self._pinned else tensor.to(self._device)


class OpenVinoEngine:
    """OpenVINO on the CPU, several batches at once, each on cores of its own where that is faster."""

    def __init__(self, name: str, model: Any, precision: str) -> None:
        self.name = name
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
            },
        )
        # Twice what runs at once: a core takes its next batch without waiting for Python to hand it one.
        jobs = 2 * compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        # And one queue more than is being filled: the last batches of a window leave no core idle.
        self._queues: SimpleQueue[Any] = SimpleQueue()
        for queue in (ov.AsyncInferQueue(compiled, jobs), ov.AsyncInferQueue(compiled, jobs)):
            queue.set_callback(_keep)
            self._queues.put(queue)
        self._turn = threading.Lock()

    def run(self, batches: Sequence[Batch]) -> list[Logits]:
        found: dict[int, Logits] = {}
        queue = self._queues.get()
        try:
            with _room(self.name):
                try:
                    with self._turn:  # the batches of one call before those of the next
                        for number, (ids, mask) in enumerate(batches):
                            inputs = {"input_ids": ids, "attention_mask": mask}
                            queue.start_async(inputs, (found, number), share_inputs=True)
                finally:
                    queue.wait_all()  # the arrays are shared: none may go while it is read
        finally:
            self._queues.put(queue)
        return [found[number] for number in range(len(batches))]


def _keep(request: Any, place: tuple[dict[int, Logits], int]) -> None:
    found, number = place
    found[number] = request.get_output_tensor(0).data.copy()


class Workbench:
    """Builds engines of one model on one device, by name; `graph_path` keeps the graph of an earlier build, if any."""

    def __init__(self, model: Classifier, device: torch.device, graph_path: Path | None = None) -> None:
        self._model = model
        self._device = device
        self._graph_path = graph_path

    def names(self) -> list[str]:
        """Every engine worth a try here. Float32 torch always is: it is what the others are compared with."""
        if self._device.type == "cuda":
            return ["torch-float16", "torch-bfloat16", "torch-float32"]
        if self._device.type != "cpu":
            return ["torch-float32"]
        try:
            bf16 = ["openvino-bfloat16"] if _cpu_has_bf16() else []
        except EngineUnavailable:
            return ["openvino-int8", "torch-float32"]  # the trial of the first reports what is not installed
        return ["openvino-int8", *bf16, "openvino-float32", "torch-float32"]

    def build(self, name: str) -> Engine:
        library, _, precision = name.partition("-")
        if library == "torch":
            # A copy: weights that were rounded once cannot be the reference any more.
            return TorchEngine(copy.deepcopy(self._model), self._device, getattr(torch, precision))
        return OpenVinoEngine(name, self.graph(name), "bf16" if precision == "bfloat16" else "f32")

    def graph(self, name: str) -> Any:
        """What OpenVINO runs under this name."""
        if self._graph_path is not None:
            return openvino().Core().read_model(self._graph_path)
        return self._quantised if name == "openvino-int8" else self._converted

    @cached_property
    def _quantised(self) -> Any:
        """Weights of matrix products in int8, a scale a row; activations follow while running, a scale a group.

        Embeddings stay float32: they are looked up, not multiplied, and rounding them costs agreement for nothing.
        """
        try:
            import nncf  # a second to load, for the one time a model's graph is made
        except ImportError as error:
            raise EngineUnavailable(f"NNCF cannot be imported ({error}); `{INSTALL_CPU_ENGINES}`") from error

        logging.getLogger("nncf").setLevel(logging.ERROR)  # its own `set_log_level` silences everybody's handlers
        ignored = nncf.IgnoredScope(types=["Gather"], validate=False)
        mode = nncf.CompressWeightsMode.INT8_ASYM
        with redirect_stdout(io.StringIO()):  # a progress bar and tables that no setting turns off
            return nncf.compress_weights(self._converted.clone(), mode=mode, ignored_scope=ignored)

    @cached_property
    def _converted(self) -> Any:
        """The float32 graph, for batches of any shape."""
        ov, example = openvino(), torch.ones((2, 8), dtype=torch.long)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # tracing fixes some Python values; the reference rows show if any mattered
            return ov.convert_model(self._model, example_input={"input_ids": example, "attention_mask": example})


def save_graph(graph: Any, path: Path) -> None:
    openvino().save_model(graph, path, compress_to_fp16=False)


def hardware(device: torch.device) -> str:
    """What an engine was chosen for, in words: another machine chooses again."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}"
    try:
        core = openvino().Core()
    except EngineUnavailable:
        return f"{platform.machine()} CPU, {torch.get_num_threads()} threads, without OpenVINO"
    features = "/".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return f"{core.get_property('CPU', 'FULL_DEVICE_NAME')}, {torch.get_num_threads()} threads, {features}"


def _cpu_has_bf16() -> bool:
    """Whether the CPU computes in bfloat16 itself; emulated it is many times slower than float32."""
    return "BF16" in openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@contextmanager
def _room(name: str) -> Iterator[None]:
    """Out of memory, however a library says it, becomes `DeviceFull`."""
    try:
        failpoint.passing("device")
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in NO_ROOM):
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            raise DeviceFull(f"{name} has no memory left for a batch this large") from error
        raise
