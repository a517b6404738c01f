"""What the system lets this process use: cores, memory, a GPU; and what follows from the name of a device. Imports no torch.

Containers limit both by control groups, of version 1, of version 2, or of both side by side. A limit holds for a group and for all
groups inside it. Functions read `proc` and the mounts below `root`. Where there is no such file, there is no limit.
"""

import math
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from evoprune.errors import OutOfMemory

ROOT = Path("/")
# Options of glibc's mallopt. Freed memory above the trim threshold is given back, what is larger than the map threshold gets new
# pages each time, and arenas of other threads than the first are kept small.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
ARENA_MAX = -8
MALLOC = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26, MMAP_THRESHOLD: 2**30, ARENA_MAX: 1}
# Bytes that torch and this package take by themselves. No model answers in less.
LIBRARIES = 2**28

# Files of a group: the limit in bytes, and the bytes in use. Above `high` the group is not killed but slowed to a crawl.
MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Of the bytes in use, what the system takes back when memory is short: cached files, those mapped into memory included.
# Version 1 counts groups inside the group only in the fields that begin with `total_`.
RECLAIMABLE = re.compile(r"^(total_)?(?:active_file|inactive_file|slab_reclaimable) (\d+)$", re.MULTILINE)

# Files that the driver of a GPU has, by the toolkit that torch was built with. The last of each is for Linux below Windows.
DRIVERS = {
    "cuda": ("dev/nvidia[0-9]*", "dev/nvmap", "usr/lib/wsl/lib/libcuda.so*"),
    "hip": ("dev/kfd", "dev/dxg"),
}
# In torch's module `version`: the toolkits that it was built with.
BUILT_WITH = re.compile(r"^(cuda|hip)\b[^=]*=\s*['\"]", re.MULTILINE)
HIDING = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
VISIBLE = re.compile(r"\s*(\d|GPU-|MIG-)")  # how the values of these begin if they do not hide every GPU
# Visual tokens before pruning that a CPU encodes in about a minute.
MAX_VISUAL_TOKENS_CPU = 4_096
# On CUDA, launches bound the time of an input of fewer units in the tower, whatever the number of rows. The number lies between
# sizes that were measured on one H200 (results/gpu.md, "Small inputs"): at 384 units pruning inside the tower lost against nothing
# pruned (0.73 to 0.99 times as fast), at 1,536 it lost against a selection after the tower (by 9%, calculated), at 4,784 it won
# against one (1.6 times as fast). It is nearer to the sizes that lost: what is between them has not been measured.
LAUNCH_BOUND_UNITS = 2048


def resolve_device(name: str, root: Path = ROOT) -> str:
    """Return the name of a device. "auto" is "cuda" if torch is built for a GPU whose driver is here and visible, else "cpu".

    The answer is final: if torch cannot use the GPU, loading a model says so (`pick_device`).
    """
    if name != "auto":
        return name
    hidden = any(variable in os.environ and not VISIBLE.match(os.environ[variable]) for variable in HIDING)
    return "cpu" if hidden or not _has_gpu(root) else "cuda"


def _has_gpu(root: Path) -> bool:
    """Return True if the driver of a GPU that the installed torch can use is here, or the build alone tells, as on Windows."""
    toolkits = _toolkits()
    if not (root / "dev").is_dir():
        return bool(toolkits)
    files = (file for toolkit in toolkits for pattern in DRIVERS[toolkit] for file in root.glob(pattern))
    return any(os.access(file, os.R_OK) for file in files)  # a control group may forbid a device


def _toolkits() -> list[str]:
    """Return the toolkits that the installed torch was built with; all if its files do not tell."""
    try:
        folders = find_spec("torch").submodule_search_locations
        return BUILT_WITH.findall(Path(folders[0], "version").with_suffix(".py").read_text(encoding="utf-8"))
    except (AttributeError, TypeError, IndexError, OSError, ValueError):  # frozen, or laid out in another way
        return list(DRIVERS)


def visual_token_limit(device: str) -> float:
    """Return how many visual tokens a device takes before pruning; infinity if only the model limits them."""
    return MAX_VISUAL_TOKENS_CPU if device.partition(":")[0] == "cpu" else math.inf


def launch_bound_units(device: str) -> int:
    """Return the number of units below which launches bound the time of an input in the tower; 0 where arithmetic does."""
    return LAUNCH_BOUND_UNITS if device.partition(":")[0] == "cuda" else 0


def available_cores(root: Path = ROOT) -> int:
    """Return how many cores this process may keep busy, at least 1.

    The cores of its affinity, or fewer where a control group has a quota of CPU time, which counts in whole cores, rounded up.
    """
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    quota = min((share for folder in _groups("cpu", root) for share in _quotas(folder)), default=math.inf)
    return max(1, math.ceil(min(cores, quota)))


def host_memory(root: Path = ROOT) -> int | None:
    """Return the bytes that this process can get now without swapping; None where unknown.

    The least of what Linux has, what the control groups leave, and what is left of the address space (`ulimit -v`). Cached files
    count as available, because the system drops them when memory is short.
    """
    try:
        (free,) = kib(root / "proc/meminfo", "MemAvailable")
        (mapped,) = kib(root / "proc/self/status", "VmSize")
    except (OSError, KeyError):
        return None
    groups = (left for folder in _groups("memory", root) for left in _left(folder))
    return min(free, _left_of_address_space(mapped), *groups)


def check_libraries(root: Path = ROOT) -> None:
    """Refuse to load torch where the system would end this process for it, without a message.

    Raises OutOfMemory: there is not even memory for the libraries.
    """
    available = host_memory(root)
    if available is not None and available < LIBRARIES:
        figures = f"{max(0, available) >> 20} MiB are available, and the libraries alone take {LIBRARIES >> 20}"
        hint = "close other programs, or give the container more"
        raise OutOfMemory(f"too little memory: {figures}", hint, stage="load")


def keep_freed_memory() -> None:
    """Has the C library keep the memory that this process frees, up to its peak; for processes of our own. Only glibc can.

    It would give back what the layers' results took, and get new pages from the system for those of the next layer, which is up to
    an eighth of the time of encoding at 3B in bf16 (results/machines.md).
    """
    import ctypes  # which --help does not need

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOC.items():
            libc.mallopt(option, value)


def oom_kills(root: Path = ROOT) -> int:
    """Return how many processes the system has ended so far because memory ran out, in whichever group; 0 where it does not
    tell.
    """
    with suppress(OSError, ValueError, StopIteration), (root / "proc/vmstat").open() as file:
        return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
    return 0


def _quotas(folder: Path) -> Iterator[float]:
    """Yield the cores' worth of time that a group gets."""
    with suppress(OSError, ValueError):  # "max" is no limit
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:  # -1 is no limit
            yield quota / period


def _left(folder: Path) -> Iterator[int]:
    """Yield what a group's limits leave of memory, in bytes."""
    for limit, used in MEMORY:
        with suppress(OSError, ValueError):  # "max" is no limit
            left = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield left + _reclaimable((folder / "memory.stat").read_text())


def _reclaimable(stat: str) -> int:
    matches = RECLAIMABLE.findall(stat)
    total = "total_" if any(prefix for prefix, _ in matches) else ""
    return sum(int(size) for prefix, size in matches if prefix == total)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that this process is in, from its own to the outermost that is visible.

    Groups of version 1 are those for this controller. Groups of version 2 may or may not have it.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    own = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for mount in mounts:
        where, _, what = mount.partition(" - ")
        kind, _, options = what.split(" ")[:3]
        if kind == "cgroup2":
            name = ""
        elif kind == "cgroup" and controller in options.split(","):
            name = controller
        else:
            continue
        if name not in own or ".." in own[name].split("/"):  # the latter: it was moved out of the visible groups
            continue
        top, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in where.split(" ")[3:5])
        # A container sees its own group at the top of the mount, under the same name as in its list of groups.
        if Path(own[name]).is_relative_to(top):
            folder = Path(own[name]).relative_to(top)
            mounted = root / point.lstrip("/")
            yield from (mounted / inner for inner in (folder, *folder.parents))


def kib(path: Path, *names: str) -> list[int]:
    """Return figures in kibibytes of a file in /proc, in bytes. Raises OSError: no such file. KeyError: no such figure."""
    values = dict(line.partition(":")[::2] for line in path.read_text("utf-8", "replace").splitlines())
    return [int(values[name].split()[0]) * 1024 for name in names]


def _left_of_address_space(mapped: int) -> float:
    import resource  # exists wherever /proc does

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return limit - mapped
