"""Device-specific behavior: dtypes, chunk sizes, copies, synchronization, timing, and memory.

This module also decides whether to use kernels and CUDA graphs. If a kernel fails, evoprune warns once and falls back to plain
PyTorch. On CUDA, a function can run on its own stream or be captured as a graph, which replays all of its kernels with a single
launch.

`pick_device` chooses the torch device when a model is loaded. After that, code takes the device from the tensors. Code outside this
package passes devices along but never checks their type.
"""

import atexit
import ctypes
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, lru_cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch

import evoprune
from evoprune import timeline
from evoprune.backend import limits
from evoprune.errors import DeviceWarning, UsageError, first_line, is_out_of_memory
from evoprune.report import Environment
from evoprune.util import size, switched_on

T = TypeVar("T")

WIDENED = ("compressed-tensors", "fp8")  # formats that transformers dequantizes when loading weights onto a CPU
STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # dtype names in safetensors
# Number of units per matrix product. With 256 units (1,024 patches), a CPU reaches full speed and the results still fit in its
# caches (results/benchmarks.md, "Kernels"). A GPU needs more units to stay busy.
PIECE_UNITS = 256
GPU_PIECE_UNITS = 8192
# Number of attention scores to hold in memory at a time. The CPU and GPU values differ for the same reasons.
SCORES = 1 << 21
GPU_SCORES = 1 << 26
# Sizes of square matrix products large enough to keep a device busy.
SIDES = (1024, 2048)
GPU_SIDES = (4096, 8192)
PROGRAM_BYTES = 224 * 2**20  # memory of Python, torch, and other modules
TOKEN_BYTES = 1024  # memory of a tokenizer per token of its vocabulary


class Device:
    """Device-dependent properties of a run: dtypes, chunk sizes, timing, memory, and device information for reports.

    Args:
        device: A torch device or its name.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._on_cuda = self._device.type == "cuda"  # torch tracks memory only on CUDA
        self._on_host = is_host(self._device)

    @property
    def kind(self) -> str:
        """The device type, such as "cuda" for "cuda:1". Devices of the same type produce the same results."""
        return self._device.type

    @staticmethod
    def describe_all() -> dict[str, str]:
        """Return a dictionary that maps each available device's name to its product name and capabilities."""
        cpu = Device("cpu")
        bf16 = "yes" if cpu.default_dtype == "bf16" else "no"
        devices = {"cpu": f"{cpu.product_name}, bf16 {bf16}"}
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            devices[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
        return devices

    @staticmethod
    def kinds() -> set[str]:
        """Return the device types that torch can use on this machine: "cpu", plus the accelerator type, if any."""
        return {"cpu", accelerator() or "cpu"}

    @property
    def product_name(self) -> str:
        if self._on_cuda:
            return torch.cuda.get_device_name(self._device)
        try:
            with open("/proc/cpuinfo") as f:
                return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
        except (OSError, StopIteration):
            return platform.processor() or platform.machine()

    def environment(self) -> Environment:
        """Return the package versions, the device's product name, and the torch thread count."""
        return Environment(
            evoprune=evoprune.__version__,
            torch=str(torch.__version__),
            transformers=_installed("transformers"),
            device_name=self.product_name,
            threads=torch.get_num_threads(),
        )

    @property
    def holds_values(self) -> bool:
        """Whether tensors on this device hold data. Meta tensors have only a shape and a dtype."""
        return self._device.type != "meta"

    @property
    def default_dtype(self) -> str:
        """The fastest dtype on this device: "bf16" if it multiplies bf16 matrices in hardware, otherwise "fp32"."""
        return "bf16" if _has_bf16(self._device) else "fp32"

    def maps_weights(self, stored: Collection[str], dtype: torch.dtype, quantize: str) -> bool:
        """Return True if a model's weights stay memory-mapped until they are packed or quantized. This only happens on a CPU.

        Args:
            stored: The weight dtypes in the model files, using safetensors names.
            dtype: The target dtype of the weights.
            quantize: The requested quantization type, or "none".
        """
        return self._on_host and (quantize != "none" or {*stored} == {STORED[dtype]})

    def widens(self, quantization: str | None) -> bool:
        """Return True if weights in this quantized format are dequantized when loaded onto the device."""
        return self._on_host and quantization in WIDENED

    @property
    def busy_cores(self) -> int:
        """Number of CPU cores kept busy by a running model.

        On the CPU, this is the torch thread count. Other devices need only one core to launch kernels.
        """
        return torch.get_num_threads() if self._on_host else 1

    @property
    def piece_units(self) -> int:
        """Number of units to embed, or to multiply by a weight matrix, at a time."""
        return PIECE_UNITS if self._on_host else GPU_PIECE_UNITS

    @property
    def reads_drafts(self) -> bool:
        """Whether verifying a few draft tokens in one pass takes about as long as decoding a single token.

        This is the case on the CPU. On CUDA, single-token passes are faster because they run as CUDA graphs.
        """
        return self._on_host

    @property
    def resizes_bytes(self) -> bool:
        """Whether torch can resize uint8 images directly on this device, as it does on the CPU."""
        return self._on_host

    @property
    def scores_at_a_time(self) -> int:
        """Number of attention scores to hold in memory at a time."""
        return SCORES if self._on_host else GPU_SCORES

    @property
    def product_sides(self) -> tuple[int, ...]:
        """Sizes of the square matrix products used to measure matmul throughput."""
        return SIDES if self._on_host else GPU_SIDES

    @property
    def uses_kernels(self) -> bool:
        """Whether this device runs evoprune's kernels. Only CUDA devices do, unless plain PyTorch is requested."""
        return uses_kernels(self._device)

    @property
    def capture(self) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
        """A function that captures another function as a CUDA graph (see `run_and_capture`), or None if graphs are unavailable."""
        if not self.uses_kernels or torch.version.cuda is None:
            return None
        return lambda function: run_and_capture(function, self._device)

    def run_beside(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run a function in a separate thread and CUDA stream. On other devices, the function does not run at all.

        Returns:
            A function that waits for the thread to finish. Exceptions raised in the thread are discarded.
        """
        if not self._on_cuda:
            return lambda: None
        device = self._device
        if device.index is None:  # resolve the index now, because each thread has its own current device
            device = torch.device("cuda", torch.cuda.current_device())

        def run() -> None:
            # Errors are ignored here because the same work runs again later, where any error is reported.
            with suppress(Exception), as_current(device), torch.cuda.stream(torch.cuda.Stream(device)):
                function()

        thread = threading.Thread(target=run, name="evoprune-beside", daemon=True)
        thread.start()
        atexit.register(thread.join)  # a compiler still running during interpreter shutdown would crash it
        return thread.join

    def now(self) -> float:
        """Return the current time in seconds. On an accelerator, wait for all launched kernels to finish first."""
        if self._device.type == accelerator():
            torch.accelerator.synchronize(self._device)
        return timeline.now()

    def available_memory(self) -> int | None:
        """Return the amount of memory, in bytes, that this process can allocate without swapping.

        On CUDA, this is the device's free memory plus the memory that torch's allocator has reserved but isn't using. On other
        devices, it is the host's available memory (see `limits.Host`). Returns None on the meta device or if the amount is unknown.
        """
        if self._on_cuda:
            cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return torch.cuda.mem_get_info(self._device)[0] + cached
        return limits.Host().available_memory() if self.holds_values else None

    def shortage(self, needed: int) -> str | None:
        """Return a user-facing message if fewer than `needed` bytes of memory are available; otherwise, None."""
        available = self.available_memory()
        if available is None or needed <= available:
            return None
        return f"needs about {size(needed)} of memory, and {size(max(0, available))} are available"

    def program_bytes(self, vocabulary: int) -> int:
        """Return the memory that the program takes on this device in addition to the model, in bytes.

        This is the memory of Python, its modules, and a tokenizer. On CUDA, it is 0, because the memory of torch's libraries isn't
        counted (see `peak_memory`).

        Args:
            vocabulary: Number of tokens in the vocabulary.
        """
        return 0 if self._on_cuda else PROGRAM_BYTES + vocabulary * TOKEN_BYTES

    def memory_in_use(self) -> tuple[int | None, int | None]:
        """Return this process's resident memory in bytes, split into its own memory and memory-mapped files.

        Both values are None on CUDA and on systems that don't report them.
        """
        if self._on_cuda:
            return None, None
        try:
            own, shared, mapped = limits.kib(Path("/proc/self/status"), "RssAnon", "RssShmem", "RssFile")
            return own + shared, mapped
        except (OSError, KeyError):
            return None, None

    def peak_memory(self) -> int | None:
        """Return the peak memory usage in bytes, or None if unknown.

        On CUDA, this is the peak of torch's allocator. On other devices, it is the peak RSS of this process.
        """
        if self._on_cuda:
            return torch.cuda.max_memory_allocated(self._device)
        try:
            # getrusage is only a fallback because its peak includes the parent process on Linux.
            return limits.kib(Path("/proc/self/status"), "VmHWM")[0]
        except (OSError, KeyError):
            pass
        if sys.platform == "win32":
            return None
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform == "darwin":  # macOS reports bytes, other systems KiB
            return peak
        return peak * 1024

    @property
    def peak_memory_note(self) -> str | None:
        """A report note saying that `peak_memory` covers the whole process, not just the measured model. None on CUDA."""
        if self._on_cuda:
            return None
        return "peak memory is measured for the whole process, including the weights of all rows"

    def reset_peak_memory(self) -> bool:
        """Reset the peak reported by `peak_memory`. Returns False if the system doesn't support this."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            with open("/proc/self/clear_refs", "w") as f:
                empty_cache()  # otherwise, a later run could reuse cached memory without raising the peak
                f.write("5")
        except OSError:
            return False
        return True


def pick_device(name: str, *, auto: bool = False) -> torch.device:
    """Return the torch device with the given name, after checking that it works.

    Issues a warning if "auto" resolved to the CPU because no GPU driver files were found, although torch does find a GPU.

    Args:
        name: The name of a torch device (never "auto").
        auto: Whether the device option was "auto", in which case `name` is the result of `DeviceName.resolve`.

    Raises:
        UsageError: If the device can't be used.
    """
    if auto and name == "cpu" and torch.cuda.is_available():
        warnings.warn("torch finds a GPU that is not used: add --device cuda to use it", DeviceWarning, stacklevel=2)
    try:
        device = torch.device(name)
    except RuntimeError as problem:
        raise UsageError(
            f"device {name!r} is unknown", "use auto, cpu, or cuda (cuda:1 is the second GPU)"
        ) from problem
    try:
        # If torch finds no GPU, its warning gives the reason. The lock is needed because this changes process-wide state.
        with _warnings_lock, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch builds without CUDA raise AssertionError
        reason = first_line(caught[-1].message if caught else problem).partition(". ")[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        failure = f"device {name!r} cannot be used here"
        hint = "cpu always works, auto finds a GPU"
        if auto:
            failure = "a GPU driver is installed, but torch cannot use the GPU"
            hint = "use --device cpu, or repair the driver (nvidia-smi or rocminfo checks it)"
        if name.startswith("cuda") and visible is not None:  # the variable may hide GPUs from this process
            hint += f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        raise UsageError(f"{failure}: {reason}", hint) from problem
    return device


def _has_bf16(device: torch.device) -> bool:
    """Return True if the device supports bf16 matmul in hardware. Without it, as on older CUDA GPUs, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return device.type == "xpu"
    flags = set()
    cpuinfo = Path("/proc/cpuinfo")
    if hasattr(torch.cpu, "get_capabilities"):  # missing from the oldest supported version of torch
        flags = {name for name, value in torch.cpu.get_capabilities().items() if value}
    elif cpuinfo.is_file():
        flags = set(cpuinfo.read_text().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"})


@cache
def _installed(package: str) -> str:
    return version(package)


def is_host(device: torch.device) -> bool:
    """Return True if a device is the CPU.

    On the CPU, reading a tensor value requires no synchronization, so shapes can depend on values. In addition, weights can stay
    memory-mapped, and matrix products run in oneDNN.
    """
    return device.type == "cpu"


def accelerator() -> str | None:
    """Return the accelerator type that torch uses on this machine, such as "cuda", or None if there is no accelerator.

    Accelerators support streams, events, and asynchronous copies from pinned memory.
    """
    device = torch.accelerator.current_accelerator()
    return device and device.type


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move `x` to `device`, using an asynchronous copy from pinned memory for CPU-to-accelerator transfers."""
    if x.device.type == "cpu" and device.type == accelerator():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Timer:
    """A context manager that accumulates the time spent inside it. It can be entered repeatedly.

    On an accelerator, the timer records events, so it doesn't synchronize until `seconds` is called.
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == accelerator() else None
        self._marks = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_) -> None:
        self._marks.append(self._mark())

    def copy(self) -> "Timer":
        """Return a new timer that continues from this timer's accumulated time."""
        timer = Timer(self._device or torch.device("cpu"))
        timer._marks = list(self._marks)
        return timer

    def _mark(self):
        if self._device is None:
            return time.perf_counter()
        event = torch.Event(self._device, enable_timing=True)
        event.record(torch.accelerator.current_stream(self._device))
        return event

    def seconds(self) -> float:
        """Return the accumulated time in seconds. On an accelerator, wait for the last timed block to finish."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._device is None:
            return sum(end - start for start, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000


def empty_cache() -> None:
    """Release unused memory from the CUDA allocator and from glibc back to the system."""
    torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


# Kernels and their fallbacks.

_warnings_lock = threading.Lock()
_failed: set[str] = set()
_plain_pytorch: list[bool] = []


def wants_plain_pytorch() -> bool:
    """Return True if EVOPRUNE_PLAIN is 1, or inside a `plain_pytorch` context."""
    return bool(_plain_pytorch) or switched_on("EVOPRUNE_PLAIN")


def uses_kernels(device: torch.device) -> bool:
    """Return True if a device runs evoprune's kernels. Only CUDA devices do, unless plain PyTorch is requested."""
    return device.type == "cuda" and not wants_plain_pytorch()


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Context manager that disables kernels and CUDA graphs, so models run the original transformers layers."""
    _plain_pytorch.append(True)
    try:
        yield
    finally:
        _plain_pytorch.pop()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return True


def failed(what: str) -> bool:
    return what in _failed


def give_up(what: str, consequence: str, problem: Exception) -> None:
    """Stop using kernels for a task after a failure, and issue a warning. Out-of-memory errors are re-raised instead.

    Args:
        what: The task name. After this call, `failed` returns True for this name.
        consequence: The start of the warning, which describes how the task runs without kernels.
        problem: The exception raised by the kernel.
    """
    if is_out_of_memory(problem):
        raise problem
    _failed.add(what)
    warnings.warn(f"{consequence}, which takes longer: {first_line(problem)}", DeviceWarning, stacklevel=3)


def with_fallback(what: str, plain_form: Callable) -> Callable[[Callable], Callable]:
    """Decorate a function that runs kernels so that it falls back to `plain_form` if kernels are disabled or fail.

    `plain_form` takes the same arguments as the decorated function. The first kernel failure issues a warning. Out-of-memory errors
    propagate instead of triggering the fallback.
    """

    def decorate(function: Callable) -> Callable:
        @wraps(function)
        def run(*args, **kwargs):
            if wants_plain_pytorch() or failed(what) or not has_triton():
                return plain_form(*args, **kwargs)
            try:
                return function(*args, **kwargs)
            except Exception as problem:
                give_up(what, f"{what} runs without its kernel", problem)
                return plain_form(*args, **kwargs)

        return run

    return decorate


# The current CUDA device, CUDA graphs, and streams.

_NOTHING = nullcontext()


def as_current(device: torch.device) -> AbstractContextManager:
    """Return a context manager that makes a CUDA device this thread's current device. It does nothing for other devices.

    Triton launches kernels on the current device, and some torch functions report its capabilities. Torch's own operators, in
    contrast, use the device of their tensors.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NOTHING
    return torch.cuda.device(device)


def on_its_device(function: Callable) -> Callable:
    """Decorate a function so that its Triton kernels are launched on the device of its first argument."""

    @wraps(function)
    def run(first: torch.Tensor, *args, **kwargs):
        with as_current(first.device):
            return function(first, *args, **kwargs)

    return run


def run_and_capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run a function, then capture it as a CUDA graph.

    Args:
        function: The function to capture. The tensors that it reads and writes must outlive the graph, and it must not copy
            anything to the host. Its exceptions propagate.
        device: The CUDA device.

    Returns:
        A function that replays the captured kernels. Host values used during the capture stay the same in every replay.
    """
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with as_current(device), torch.cuda.stream(stream):
        function()  # the first call initializes libraries and loads kernels, which is not allowed during capture
        # Don't use `torch.cuda.graph`, because it empties the allocator's cache. This error mode lets other threads use the device
        # during capture.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)

    def replay() -> None:
        with as_current(device):
            graph.replay()

    return replay


def read_or(read: Callable[[], T], like: torch.Tensor, otherwise: T) -> T:
    """Return `read()` if `like` is on the CPU, where reading tensor values requires no synchronization.

    On other devices, return `otherwise`, which is typically an upper bound known without reading any values.
    """
    return read() if is_host(like.device) else otherwise
