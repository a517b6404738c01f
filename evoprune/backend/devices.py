"""What a device does in its own way: its dtype, how much is computed at a time, copies, waits, time, memory.

Also whether kernels and graphs are used, what happens where a kernel fails (plain PyTorch, and one warning), and functions on
streams of CUDA: as a graph, whose one launch runs all kernels again on the same memory, or beside the program.

A device is torch's, chosen when a model is loaded (`pick_device`); tensors carry it from then on. Functions outside of this package
hand it on, and do not ask what it is.
"""

import atexit
import ctypes
import os
import platform
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import cache, lru_cache, wraps
from importlib.metadata import version
from pathlib import Path

import torch

import evoprune
from evoprune.backend import limits
from evoprune.errors import DeviceWarning, UsageError, first_line, is_out_of_memory
from evoprune.report import Environment

HOST = torch.device("cpu")  # whose values the program reads without waiting
# Units whose rows go through a product at a time. 256 units (1,024 patches) keep matrix products at full speed and their
# results in a CPU's caches (results/benchmarks.md, "Kernels"). A GPU needs more to be busy.
PIECE_UNITS = 256
GPU_PIECE_UNITS = 8192
# Entries of a score matrix held at a time, for the same reasons.
SCORES = 1 << 21
GPU_SCORES = 1 << 26
# Sides of square products that keep a device busy.
SIDES = (1024, 2048)
GPU_SIDES = (4096, 8192)


def pick_device(name: str, *, auto: bool = False) -> torch.device:
    """Return the device of a name.

    `auto`: whether the option was "auto", so that `name` is the answer of `limits.resolve_device`. Warns if torch finds a GPU that
    the driver's files did not promise.

    Raises UsageError: it cannot be used.
    """
    if auto and name == "cpu" and torch.cuda.is_available():
        warnings.warn("torch finds a GPU, which is not used: --device cuda uses it", DeviceWarning, stacklevel=2)
    try:
        with warnings.catch_warnings(record=True) as said:  # why torch finds no GPU is in a warning
            warnings.simplefilter("always")
            device = torch.device(name)
            torch.zeros(1, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as problem:  # torch without CUDA asserts
        reason = first_line(said[-1].message if said else problem).partition(". ")[0]
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = f"device {name!r} cannot be used here"
        hint = "cpu always works, auto finds a GPU"
        if auto:
            found = "the driver of a GPU is here, but torch cannot use the GPU"
            hint = "--device cpu does without it; or repair the driver, which nvidia-smi or rocminfo checks"
        if _on_cuda(name) and visible is not None:  # which may hide GPUs from this process
            hint += f"; CUDA_VISIBLE_DEVICES is {visible!r}"
        raise UsageError(f"{found}: {reason}", hint) from problem
    return device


def default_dtype(device: torch.device) -> str:
    """Return the name of the dtype in which it computes fastest: bf16 if it multiplies that in hardware, else fp32."""
    return "bf16" if _has_bf16(device) else "fp32"


def _has_bf16(device: torch.device) -> bool:
    """Return whether it multiplies bf16 in hardware; where it does not, as on older GPUs of CUDA, bf16 is slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return device.type == "xpu"
    flags = set()
    cpuinfo = Path("/proc/cpuinfo")
    if hasattr(torch.cpu, "get_capabilities"):  # not in the oldest torch that is supported
        flags = {name for name, value in torch.cpu.get_capabilities().items() if value}
    elif cpuinfo.is_file():
        flags = set(cpuinfo.read_text().split())
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "arm_bf16"})


@cache
def _installed(package: str) -> str:
    """Return the version of an installed package, for which files are read."""
    return version(package)


def environment(device: str) -> Environment:
    """Return versions, device and threads."""
    return Environment(
        evoprune=evoprune.__version__,
        torch=str(torch.__version__),
        transformers=_installed("transformers"),
        device_name=device_name(device),
        threads=torch.get_num_threads(),
    )


def describe_devices() -> dict[str, str]:
    """Return the devices here by name: the product of each, and what it has."""
    bf16 = "yes" if _has_bf16(HOST) else "no"
    devices = {"cpu": f"{device_name('cpu')}, bf16 {bf16}"}
    for number in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(number)
        devices[f"cuda:{number}"] = f"{facts.name}, {facts.total_memory / 2**30:.1f} GiB"
    return devices


def device_name(device: str) -> str:
    """Return the name of the product."""
    if _on_cuda(device):
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            return next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def kind(device: str) -> str:
    """Return the kind of a device of this name: "cuda" of "cuda:1". Devices of a kind compute the same numbers."""
    return torch.device(device).type


def _on_cuda(name: str) -> bool:
    """Return whether a device of this name, as options have it, is one of CUDA, whose memory torch counts."""
    return name.startswith("cuda")


def cluster_share(device: str, gpus: int, cores: Sequence[int]) -> tuple[int, dict[str, float]]:
    """Return how many processes with a model a cluster has room for, and the share of each, as Ray names it.

    On GPUs each has one. On CPUs each has as many cores as the smallest node.

    Args:
        device: as options have it. gpus: of the whole cluster. cores: of each node.
    """
    if _on_cuda(device) or (device == "auto" and gpus):
        return max(1, gpus), {"num_gpus": 1}
    min_cores = min((count for count in cores if count), default=1)
    return max(1, sum(count // min_cores for count in cores)), {"num_cpus": min_cores}


def holds_values(device: torch.device) -> bool:
    """Return whether tensors there have values: those of the meta device have shapes alone."""
    return device.type != "meta"


def is_host(device: torch.device) -> bool:
    """Return whether it is the CPU.

    Reading a value costs nothing there, so shapes may depend on values. Weights may stay in the pages of files, and products are
    those of oneDNN.
    """
    return device.type == "cpu"


def busy_cores(device: torch.device) -> int:
    """Return how many cores a model keeps busy: on the CPU those of torch's threads; another device is driven by one."""
    return torch.get_num_threads() if is_host(device) else 1


def largest_piece(device: torch.device) -> int:
    """Return how many units are embedded, and rows go through a product, at a time."""
    return PIECE_UNITS if is_host(device) else GPU_PIECE_UNITS


def scores_at_a_time(device: torch.device) -> int:
    """Return how many entries of a score matrix are held at a time."""
    return SCORES if is_host(device) else GPU_SCORES


def product_sides(device: torch.device) -> tuple[int, ...]:
    """Return the sides of square products that keep it busy, by which its rate is measured."""
    return SIDES if is_host(device) else GPU_SIDES


def accelerator() -> str | None:
    """Return the kind of device that torch drives here by streams and events, to which pinned memory is copied meanwhile."""
    device = torch.accelerator.current_accelerator()
    return device and device.type


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return `x` on `device`. A copy from the CPU to an accelerator does not wait for it."""
    if x.device.type == "cpu" and device.type == accelerator():
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def cat(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the pieces one behind the other; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def now(device: torch.device) -> float:
    """Return the time in seconds. On an accelerator it waits until all kernels are done, which run on after Python has gone on."""
    if device.type == accelerator():
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Timer:
    """Add up the time of the blocks of this context; on an accelerator it records events, which only `seconds` reads."""

    def __init__(self, device: torch.device):
        self._device = device if device.type == accelerator() else None
        self._marks = []

    def __enter__(self) -> None:
        self._marks.append(self._mark())

    def __exit__(self, *_) -> None:
        self._marks.append(self._mark())

    def copy(self) -> "Timer":
        """Return a new timer that starts from the same sum."""
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
        """Return the sum so far, in seconds. On an accelerator this synchronises with the last block."""
        pairs = list(zip(self._marks[::2], self._marks[1::2], strict=True))
        if self._device is None:
            return sum(end - start for start, end in pairs)
        if pairs:
            pairs[-1][1].synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1000


def peak_memory(device: str) -> int | None:
    """Return bytes: on CUDA the allocator's peak, else the largest resident size of this process so far. None where unknown."""
    if _on_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage: on Linux its peak includes the process that started this one.
        return limits.kib(Path("/proc/self/status"), "VmHWM")[0]
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:  # not a Unix
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # in bytes, elsewhere in KiB
        return peak
    return peak * 1024


def peak_memory_note(device: str) -> str | None:
    """Return what `peak_memory` counts beside the model in question, where that is more."""
    if _on_cuda(device):
        return None
    return "peak memory is the process's, with the weights of all rows in it"


def counted_memory(device: str) -> int:
    """Return the bytes in use now, as `peak_memory` counts them. Raises TypeError where the system does not tell."""
    if _on_cuda(device):
        return torch.cuda.memory_allocated(device)
    return sum(memory_in_use(device))


def memory_in_use(device: str) -> tuple[int | None, int | None]:
    """Return the bytes of this process now: its own, and pages of files mapped into memory. None where unknown, and on CUDA."""
    if _on_cuda(device):
        return None, None
    try:
        own, shared, mapped = limits.kib(Path("/proc/self/status"), "RssAnon", "RssShmem", "RssFile")
        return own + shared, mapped
    except (OSError, KeyError):
        return None, None


def reset_peak_memory(device: str) -> bool:
    """Restarts the count of `peak_memory`; False where the system cannot."""
    if _on_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as f:
            empty_cache()  # it would be used uncounted
            f.write("5")
    except OSError:
        return False
    return True


def available_memory(device: str) -> int | None:
    """Return the bytes that this process can get now without swapping; None where unknown, and on the meta device.

    On CUDA: what is free on the device and in torch's own allocator. Else see `limits.host_memory`.
    """
    if _on_cuda(device):
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if not holds_values(torch.device(device)):
        return None
    return limits.host_memory()


def empty_cache() -> None:
    """Returns memory that was freed and is kept: CUDA's, and that of glibc."""
    torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Provide a context in which convolutions of CUDA in float32 do not round their factors to 10 bits, as they do by default."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


# Kernels, and what replaces them.

_failed: set[str] = set()
_plain_pytorch: list[bool] = []


def wants_plain_pytorch() -> bool:
    """Return whether EVOPRUNE_PLAIN is set, and not to 0, or this is inside of `plain_pytorch`."""
    return bool(_plain_pytorch) or os.environ.get("EVOPRUNE_PLAIN", "0") not in ("", "0")


def uses_kernels(device: torch.device) -> bool:
    """Return whether kernels are used there: on CUDA, unless plain PyTorch is wanted."""
    return device.type == "cuda" and not wants_plain_pytorch()


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Provide a context in which no kernel and no graph is used, and transformers' own layers run."""
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


def give_up(what: str, said: str, problem: Exception) -> None:
    """Run `what` without kernels from now on, and say so. Raises `problem` again if it is about memory."""
    if is_out_of_memory(problem):
        raise problem
    _failed.add(what)
    warnings.warn(f"{said}, which takes longer: {first_line(problem)}", DeviceWarning, stacklevel=3)


def with_fallback(what: str, plain_form: Callable) -> Callable[[Callable], Callable]:
    """Decorates a function that runs kernels: `plain_form`, of the same arguments, replaces it where they are off or have failed.

    A failure is said once. Running out of memory is none.
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


# The current device, graphs and streams of CUDA.

_NOTHING = nullcontext()


def as_current(device: torch.device) -> AbstractContextManager:
    """Return a context in which a device of CUDA is this thread's current one: Triton launches there, and torch asks what it can.

    Torch's own operators find the device by their tensors.
    """
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return _NOTHING
    return torch.cuda.device(device)


def on_its_device(function: Callable) -> Callable:
    """Decorates a function that launches kernels of Triton: its first argument is a tensor on the device that is meant."""

    @wraps(function)
    def run(first: torch.Tensor, *args, **kwargs):
        with as_current(first.device):
            return function(first, *args, **kwargs)

    return run


def capture_on(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """Return `run_and_capture` of a device; None where there are no graphs, or plain PyTorch is wanted."""
    if not uses_kernels(device) or torch.version.cuda is None:
        return None
    return lambda function: run_and_capture(function, device)


def run_and_capture(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Runs a function, then captures it. Returns what runs its kernels again; whatever values it read on the host stay.

    The function reads and writes tensors that outlive the graph, and copies nothing to the host. What it raises passes through.
    """
    stream = torch.cuda.Stream(device)
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with as_current(device), torch.cuda.stream(stream):
        function()  # libraries are set up and kernels are loaded, which a capture refuses
        # Not `torch.cuda.graph`, which empties the allocator. Other threads may use the device meanwhile.
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


def run_beside(function: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Begins a function on CUDA, in a thread and on a stream of its own. Returns what waits for its end; what it raises is lost."""
    if device.type != "cuda":
        return lambda: None
    if device.index is None:  # the current device of this thread: each has its own
        device = torch.device("cuda", torch.cuda.current_device())

    def run() -> None:
        # What is wrong the program itself will say, when it does the same.
        with suppress(Exception), as_current(device), torch.cuda.stream(torch.cuda.Stream(device)):
            function()

    thread = threading.Thread(target=run, name="evoprune-beside", daemon=True)
    thread.start()
    atexit.register(thread.join)  # a compiler that runs while the interpreter ends crashes it
    return thread.join


# Values that are read where this costs nothing, as on the CPU; elsewhere something serves that needs no reading.


def count_or_bound(count: Callable[[], int], like: torch.Tensor, bound: int) -> int:
    """Return what `count` reads on the device of `like`, or else an upper bound of it."""
    return count() if is_host(like.device) else bound


def positive_or_all(number: torch.Tensor, *along: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return `number` (`[n]`) where it is above 0, and there what goes `along` with it (`[n, ...]`), or else all of each."""
    if not is_host(number.device):
        return number, *along
    at = (number > 0).nonzero().flatten()
    return number[at], *(x[at] for x in along)


def known_false(flag: torch.Tensor) -> bool:
    """Return whether `flag` (bool, without dimension) was read and is false, or else False."""
    return is_host(flag.device) and not flag


def read_together(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two tensors `[n]` on the CPU: as they are, or else by one copy, as int64."""
    if is_host(second.device):
        return first, second
    return torch.cat([first.long(), second]).cpu().split([len(first), len(second)])
