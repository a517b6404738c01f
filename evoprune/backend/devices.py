"""Device-specific behavior: dtypes, chunk sizes, copies, synchronization, timing and memory.

This module also decides whether to use kernels and CUDA graphs. If a kernel fails, it falls back to plain PyTorch with a single
warning. On CUDA, it can capture a function as a graph, which replays all kernels with one launch, or run a function on a separate
stream.

Devices are torch devices. They are chosen when a model is loaded (`pick_device`), and from then on they come from the tensors.
Functions outside of this package pass devices on without checking what kind they are.
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
from evoprune.backend import limits
from evoprune.errors import DeviceWarning, UsageError, first_line, is_out_of_memory
from evoprune.report import Environment

T = TypeVar("T")

WIDENED = ("compressed-tensors", "fp8")  # formats that transformers dequantizes when it loads weights on a CPU
STORED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}  # dtype names in safetensors
# The number of units whose rows are multiplied at a time. With 256 units (1,024 patches), matrix products run at full speed, and
# their results stay in the CPU caches (results/benchmarks.md, "Kernels"). A GPU needs more units to be busy.
PIECE_UNITS = 256
GPU_PIECE_UNITS = 8192
# The number of score matrix entries to hold at a time, for the same reasons.
SCORES = 1 << 21
GPU_SCORES = 1 << 26
# Side lengths of square matrix products that keep a device busy.
SIDES = (1024, 2048)
GPU_SIDES = (4096, 8192)


class Device:
    """The device-dependent properties of a run: speed, memory, clock, and the versions that reports include.

    Args:
        device: A torch device, or its name.
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        self._on_cuda = self._device.type == "cuda"  # torch keeps track of memory only on CUDA
        self._on_host = is_host(self._device)

    @property
    def kind(self) -> str:
        """The kind of the device, such as "cuda" for "cuda:1". Devices of the same kind compute the same numbers."""
        return self._device.type

    @staticmethod
    def describe_all() -> dict[str, str]:
        """Return a description of each available device (product name and capabilities), keyed by device name."""
        cpu = Device("cpu")
        bf16 = "yes" if cpu.default_dtype == "bf16" else "no"
        devices = {"cpu": f"{cpu.product_name}, bf16 {bf16}"}
        for number in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(number)
            devices[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
        return devices

    @staticmethod
    def kinds() -> set[str]:
        """Return the kinds of devices that torch can use here: "cpu", and the accelerator's kind if there is an accelerator."""
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
        """Return the package versions, the product name of the device, and the number of threads."""
        return Environment(
            evoprune=evoprune.__version__,
            torch=str(torch.__version__),
            transformers=_installed("transformers"),
            device_name=self.product_name,
            threads=torch.get_num_threads(),
        )

    @property
    def holds_values(self) -> bool:
        """Whether tensors on the device have values. Tensors on the meta device have only shapes."""
        return self._device.type != "meta"

    @property
    def default_dtype(self) -> str:
        """The name of the fastest dtype: "bf16" if the device has hardware bf16 matmul, otherwise "fp32"."""
        return "bf16" if _has_bf16(self._device) else "fp32"

    def maps_weights(self, stored: Collection[str], dtype: torch.dtype, quantize: str) -> bool:
        """Return True if weights stay memory-mapped until they are packed or quantized, as on a CPU.

        Args:
            stored: The dtypes of the weights in the files, under their safetensors names.
            dtype: The requested dtype.
            quantize: The requested kind of quantization, or "none".
        """
        return self._on_host and (quantize != "none" or {*stored} == {STORED[dtype]})

    def widens(self, quantization: str | None) -> bool:
        """Return True if weights with this quantization are dequantized when they are loaded."""
        return self._on_host and quantization in WIDENED

    @property
    def busy_cores(self) -> int:
        """The number of cores that a running model keeps busy.

        This is the number of torch threads on the CPU, or one core to drive any other device.
        """
        return torch.get_num_threads() if self._on_host else 1

    @property
    def piece_units(self) -> int:
        """The number of units to embed, or to send through a matrix product, at a time."""
        return PIECE_UNITS if self._on_host else GPU_PIECE_UNITS

    @property
    def resizes_bytes(self) -> bool:
        """Whether torch can resize uint8 images on the device, as it can on the CPU."""
        return self._on_host

    @property
    def scores_at_a_time(self) -> int:
        """The number of score matrix entries to hold at a time."""
        return SCORES if self._on_host else GPU_SCORES

    @property
    def product_sides(self) -> tuple[int, ...]:
        """Side lengths of the square matrix products used to measure the matmul rate."""
        return SIDES if self._on_host else GPU_SIDES

    @property
    def uses_kernels(self) -> bool:
        """Whether kernels run. They run only on CUDA, unless plain PyTorch is requested."""
        return uses_kernels(self._device)

    @property
    def capture(self) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
        """`run_and_capture` for this device, or None if the device has no CUDA graphs or plain PyTorch is requested."""
        if not self.uses_kernels or torch.version.cuda is None:
            return None
        return lambda function: run_and_capture(function, self._device)

    def run_beside(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run a function in its own thread and CUDA stream. This is a no-op on other devices.

        Returns:
            A function that waits for the thread to end. Exceptions in the thread are discarded.
        """
        if not self._on_cuda:
            return lambda: None
        device = self._device
        if device.index is None:  # resolve the index here, because each thread has its own current device
            device = torch.device("cuda", torch.cuda.current_device())

        def run() -> None:
            # The program will do the same work again later, and will report the error then.
            with suppress(Exception), as_current(device), torch.cuda.stream(torch.cuda.Stream(device)):
                function()

        thread = threading.Thread(target=run, name="evoprune-beside", daemon=True)
        thread.start()
        atexit.register(thread.join)  # a compiler that still runs while the interpreter shuts down would crash it
        return thread.join

    def now(self) -> float:
        """Return the current time in seconds. On an accelerator, this first waits until all launched kernels have finished."""
        if self._device.type == accelerator():
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def available_memory(self) -> int | None:
        """Return the number of bytes that this process can allocate without swapping.

        On CUDA, this is the device's free memory plus the unused part of torch's allocator. On other devices, it is the host's
        memory (see `limits.Host`). Returns None if the number is unknown or if this is the meta device.
        """
        if self._on_cuda:
            cached = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            return torch.cuda.mem_get_info(self._device)[0] + cached
        return limits.Host().available_memory() if self.holds_values else None

    def shortage(self, needed: int) -> str | None:
        """Describe how much memory is missing for `needed` bytes. Returns None if enough memory is available."""
        available = self.available_memory()
        if available is None or needed <= available:
            return None
        return f"needs about {_size(needed)} of memory, and {_size(available)} are available"

    def memory_in_use(self) -> tuple[int | None, int | None]:
        """Return the bytes that this process currently uses: its own memory, and mapped file pages.

        Both are None on CUDA or if they are unknown.
        """
        if self._on_cuda:
            return None, None
        try:
            own, shared, mapped = limits.kib(Path("/proc/self/status"), "RssAnon", "RssShmem", "RssFile")
            return own + shared, mapped
        except (OSError, KeyError):
            return None, None

    def peak_memory(self) -> int | None:
        """Return the peak memory in bytes, or None if it is unknown.

        On CUDA, this is the peak of torch's allocator. On other devices, it is the peak RSS of this process.
        """
        if self._on_cuda:
            return torch.cuda.max_memory_allocated(self._device)
        try:
            # getrusage is only a fallback, because its peak includes the parent process on Linux.
            return limits.kib(Path("/proc/self/status"), "VmHWM")[0]
        except (OSError, KeyError):
            pass
        try:
            import resource
        except ImportError:  # not a Unix
            return None
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if sys.platform == "darwin":  # macOS reports bytes, other systems KiB
            return peak
        return peak * 1024

    @property
    def peak_memory_note(self) -> str | None:
        """A note for reports if `peak_memory` covers more than the measured model, otherwise None."""
        if self._on_cuda:
            return None
        return "peak memory is measured for the whole process, including the weights of all rows"

    def reset_peak_memory(self) -> bool:
        """Reset the peak that `peak_memory` returns. Returns False if the system does not support this."""
        if self._on_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
            return True
        try:
            with open("/proc/self/clear_refs", "w") as f:
                empty_cache()  # otherwise, cached memory would be reused without raising the peak
                f.write("5")
        except OSError:
            return False
        return True


def _size(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{max(0, size) >> 20} MiB"


def pick_device(name: str, *, auto: bool = False) -> torch.device:
    """Return the device with this name.

    Warns if `auto` chose the CPU because no GPU driver files were found, although torch finds a GPU.

    Args:
        name: A device name as in options, already resolved, so it is never "auto".
        auto: Whether the option was "auto" and `name` is the result of `DeviceName.resolve`.

    Raises:
        UsageError: If the device cannot be used.
    """
    if auto and name == "cpu" and torch.cuda.is_available():
        warnings.warn("torch finds a GPU that is not used: add --device cuda to use it", DeviceWarning, stacklevel=2)
    try:
        with warnings.catch_warnings(record=True) as caught:  # if torch finds no GPU, a warning gives the reason
            warnings.simplefilter("always")
            device = torch.device(name)
            torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as problem:  # a torch build without CUDA raises AssertionError
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
    """Return True if a device has hardware bf16 matmul. Without it, as on older CUDA GPUs, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return device.type == "xpu"
    flags = set()
    cpuinfo = Path("/proc/cpuinfo")
    if hasattr(torch.cpu, "get_capabilities"):  # missing in the oldest supported torch version
        flags = {name for name, value in torch.cpu.get_capabilities().items() if value}
    elif cpuinfo.is_file():
        flags = set(cpuinfo.read_text().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"})


@cache
def _installed(package: str) -> str:
    """Return the version of an installed package. Cached because the lookup reads files."""
    return version(package)


def is_host(device: torch.device) -> bool:
    """Return True if a device is the CPU.

    On the CPU, reading a value requires no synchronization, so shapes can depend on values. Weights can stay memory-mapped, and
    matrix products run in oneDNN.
    """
    return device.type == "cpu"


def accelerator() -> str | None:
    """Return the kind of accelerator that torch drives with streams and events, or None.

    Copies from pinned memory to the accelerator are asynchronous.
    """
    device = torch.accelerator.current_accelerator()
    return device and device.type


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `x` on `device`. Copies from the CPU to an accelerator are asynchronous."""
    if x.device.type == "cpu" and device.type == accelerator():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


class Timer:
    """A context manager that adds up the time spent in its blocks.

    On an accelerator, it records events and synchronizes only in `seconds`.
    """

    def __init__(self, device: torch.device):
        self._device = device if device.type == accelerator() else None
        self._marks = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_) -> None:
        self._marks.append(self._mark())

    def copy(self) -> "Timer":
        """Return a new timer that starts with the time measured so far."""
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
        """Return the total time so far in seconds. On an accelerator, this waits for the last block to finish."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._device is None:
            return sum(end - start for start, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000


def empty_cache() -> None:
    """Return unused cached memory to the system, from both the CUDA allocator and glibc."""
    torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


# Kernels and their fallbacks.

_failed: set[str] = set()
_plain_pytorch: list[bool] = []


def wants_plain_pytorch() -> bool:
    """Return True if EVOPRUNE_PLAIN is set to a value other than 0, or if a `plain_pytorch` context is active."""
    return bool(_plain_pytorch) or os.environ.get("EVOPRUNE_PLAIN", "0") not in ("", "0")


def uses_kernels(device: torch.device) -> bool:
    """Return True if a device uses kernels. Kernels run only on CUDA, unless plain PyTorch is requested."""
    return device.type == "cuda" and not wants_plain_pytorch()


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Disable kernels and CUDA graphs within this context, and run transformers' own layers."""
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
    """Stop using kernels for `what`, and warn about it. If `problem` is an out-of-memory error, it is raised again instead.

    Args:
        what: The work that runs without kernels from now on, as a name for `failed`.
        consequence: What happens without kernels. This is the beginning of the warning.
        problem: The exception that a kernel raised.
    """
    if is_out_of_memory(problem):
        raise problem
    _failed.add(what)
    warnings.warn(f"{consequence}, which takes longer: {first_line(problem)}", DeviceWarning, stacklevel=3)


def with_fallback(what: str, plain_form: Callable) -> Callable[[Callable], Callable]:
    """Decorate a function that runs kernels, so that `plain_form` is called instead if kernels are disabled or have failed.

    `plain_form` takes the same arguments as the function. The first failure causes a warning. Out-of-memory errors are raised
    instead of triggering the fallback.
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


# The current CUDA device, CUDA graphs and streams.

_NOTHING = nullcontext()


def as_current(device: torch.device) -> AbstractContextManager:
    """Return a context that makes a CUDA device the current device of this thread. It is a no-op for other devices.

    Triton launches kernels on the current device, and torch reports the capabilities of the current device. Torch's own operators
    take the device from their tensors.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NOTHING
    return torch.cuda.device(device)


def on_its_device(function: Callable) -> Callable:
    """Decorate a function that launches Triton kernels, so that they run on the device of the function's first argument."""

    @wraps(function)
    def run(first: torch.Tensor, *args, **kwargs):
        with as_current(first.device):
            return function(first, *args, **kwargs)

    return run


def run_and_capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Run a function, then capture it as a CUDA graph.

    Args:
        function: Reads and writes tensors that outlive the graph. It must not copy anything to the host. Its exceptions propagate.
        device: The CUDA device.

    Returns:
        A function that replays the kernels. Values that `function` read on the host keep the values they had during the capture.
    """
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with as_current(device), torch.cuda.stream(stream):
        function()  # sets up libraries and loads kernels, which is not allowed during a capture
        # `torch.cuda.graph` is not used, because it would empty the allocator. The error mode allows other threads to use the
        # device during the capture.
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
    """Return `read()` if `like` is on the CPU, where reading values requires no synchronization.

    On other devices, return `otherwise` instead. This is a value that can be known without synchronization, such as an upper bound.
    """
    return read() if is_host(like.device) else otherwise
