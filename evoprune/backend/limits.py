"""The resources that the system grants this process (cores, memory, a GPU), and limits for each kind of device. Imports no torch.

Containers limit cores and memory with control groups (cgroups) of version 1, version 2, or both. A limit applies to a group and to
all groups inside it. If a file does not exist, there is no limit.
"""

import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

ROOT = Path("/")
# Options of glibc's mallopt. Free memory above the trim threshold is returned to the system. Blocks larger than the mmap threshold
# get new pages each time. With an arena maximum of 1, all threads share one arena.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
ARENA_MAX = -8
MALLOC = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26, MMAP_THRESHOLD: 2**30, ARENA_MAX: 1}

# Pairs of files in a group's folder: the limit in bytes, and the bytes in use. A group that exceeds `high` is not killed, but it is
# slowed to a crawl.
MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Matches the bytes in use that the system can reclaim when memory is short: cached files, including mapped ones.
# In version 1, only fields that begin with `total_` include the groups inside this group.
RECLAIMABLE = re.compile(r"^(total_)?(?:active_file|inactive_file|slab_reclaimable) (\d+)$", re.MULTILINE)

# Files that GPU drivers create, by the toolkit that torch was built with. The last pattern in each row is for WSL.
DRIVERS = {
    "cuda": ("dev/nvidia[0-9]*", "dev/nvmap", "usr/lib/wsl/lib/libcuda.so*"),
    "hip": ("dev/kfd", "dev/dxg"),
}
# Finds the toolkits that torch was built with in its `version` module.
BUILT_WITH = re.compile(r"^(cuda|hip)\b[^=]*=\s*['\"]", re.MULTILINE)
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
VISIBLE = re.compile(r"\s*(\d|GPU-|MIG-)")  # how these variables start if at least one GPU stays visible
# The number of visual tokens before pruning that a CPU encodes in about a minute.
MAX_VISUAL_TOKENS_CPU = 4_096
# On CUDA, the tower is launch-bound for inputs with fewer units than this, whatever the number of rows. The threshold lies between
# sizes that were measured on one H200 (results/gpu.md, "Small inputs"). At 384 units, pruning inside the tower was slower than no
# pruning (0.73 to 0.99 times as fast). At 1,536 units, it was slower than a selection after the tower (by 9%, calculated). At 4,784
# units, it was 1.6 times as fast as a selection after the tower. Sizes in between have not been measured, so the threshold was set
# closer to the sizes at which pruning inside the tower was slower.
LAUNCH_BOUND_UNITS = {"cuda": 2048}


class DeviceName:
    """Properties that follow from the name of a device, without importing torch.

    Args:
        name: A device name as in options: "auto", or the name of a torch device such as "cuda:1".
    """

    def __init__(self, name: str):
        self.name = name
        self._kind = name.partition(":")[0]

    def resolve(self, root: Path = ROOT) -> str:
        """Return the name of the device to use.

        "auto" resolves to "cuda" if torch is built for a GPU whose driver is installed and visible, otherwise to "cpu". The result
        is final. If torch then cannot use the GPU, loading a model raises an error (see `pick_device`).
        """
        if self.name != "auto":
            return self.name
        hidden = any(variable in os.environ and not VISIBLE.match(os.environ[variable]) for variable in VISIBLE_DEVICES)
        return "cpu" if hidden or not _has_gpu(root) else "cuda"

    @property
    def visual_token_limit(self) -> float:
        """The maximum number of visual tokens before pruning, or infinity if only the model limits them."""
        return MAX_VISUAL_TOKENS_CPU if self._kind == "cpu" else math.inf

    @property
    def launch_bound_units(self) -> int:
        """The number of units below which the tower is launch-bound, or 0 if it never is."""
        return LAUNCH_BOUND_UNITS.get(self._kind, 0)

    def cluster_share(self, gpus: int, cores: Sequence[int]) -> tuple[int, dict[str, float]]:
        """Return the number of model processes that fit on a Ray cluster, and the resources of each process under Ray's names.

        On GPUs, each process gets one GPU. On CPUs, each process gets as many cores as the smallest node has.

        Args:
            gpus: The number of GPUs in the whole cluster.
            cores: The number of cores of each node.
        """
        if self.name.startswith("cuda") or (self.name == "auto" and gpus):
            return max(1, gpus), {"num_gpus": 1}
        min_cores = min((count for count in cores if count), default=1)
        return max(1, sum(count // min_cores for count in cores)), {"num_cpus": min_cores}


def _has_gpu(root: Path) -> bool:
    """Return True if there is a driver for a GPU that torch supports.

    On systems without /dev, such as Windows, only torch's build is checked.
    """
    toolkits = _toolkits()
    if not (root / "dev").is_dir():
        return bool(toolkits)
    files = (file for toolkit in toolkits for pattern in DRIVERS[toolkit] for file in root.glob(pattern))
    return any(os.access(file, os.R_OK) for file in files)  # a control group may forbid a device


def _toolkits() -> list[str]:
    """Return the toolkits that the installed torch was built with, or all toolkits if this cannot be read from its files."""
    try:
        folders = find_spec("torch").submodule_search_locations
        return BUILT_WITH.findall(Path(folders[0], "version").with_suffix(".py").read_text(encoding="utf-8"))
    except (AttributeError, TypeError, IndexError, OSError, ValueError):  # torch is frozen or has a different layout
        return list(DRIVERS)


class Host:
    """The cores and memory that the system grants this process.

    Args:
        root: The folder that contains `proc` and the mount points of control groups.
    """

    def __init__(self, root: Path = ROOT):
        self._root = root

    def available_cores(self) -> int:
        """Return the number of cores that this process may keep busy, at least 1.

        This is the number of cores in its CPU affinity, or less if a control group has a CPU quota. A quota is rounded up to whole
        cores.
        """
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        folders = _groups("cpu", self._root)
        quota = min((quota for folder in folders for quota in _quotas(folder)), default=math.inf)
        return max(1, math.ceil(min(cores, quota)))

    def available_memory(self) -> int | None:
        """Return the number of bytes that this process can allocate without swapping, or None if unknown.

        This is the minimum of the memory available in Linux, the memory left by control groups, and the rest of the address space
        (`ulimit -v`). Cached files count as available, because the system drops them when memory is short.
        """
        try:
            (free,) = kib(self._root / "proc/meminfo", "MemAvailable")
            (mapped,) = kib(self._root / "proc/self/status", "VmSize")
        except (OSError, KeyError):
            return None
        groups = (unused for folder in _groups("memory", self._root) for unused in _unused_memory(folder))
        return min(free, _unused_address_space(mapped), *groups)

    def oom_kills(self) -> int:
        """Return the number of processes, in any group, that the system has killed so far for lack of memory. 0 if unknown."""
        with suppress(OSError, ValueError, StopIteration), (self._root / "proc/vmstat").open() as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        return 0


def keep_freed_memory() -> None:
    """Make the C library keep freed memory, up to the peak of this process. Works only with glibc.

    Use it only in processes that belong to evoprune. By default, glibc returns the memory of layer results to the system and
    requests new pages for the next layer. This takes up to an eighth of the encoding time of a 3B model in bf16
    (results/machines.md).
    """
    import ctypes  # imported here so that --help does not load it

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOC.items():
            libc.mallopt(option, value)


def _quotas(folder: Path) -> Iterator[float]:
    """Yield the CPU quotas of a group, in cores."""
    with suppress(OSError, ValueError):  # "max" means no limit
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:  # -1 means no limit
            yield quota / period


def _unused_memory(folder: Path) -> Iterator[int]:
    """Yield the bytes of memory that are left below each limit of a group."""
    for limit, used in MEMORY:
        with suppress(OSError, ValueError):  # "max" means no limit
            unused = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield unused + _reclaimable((folder / "memory.stat").read_text())


def _reclaimable(stat: str) -> int:
    matches = RECLAIMABLE.findall(stat)
    total = "total_" if any(prefix for prefix, _ in matches) else ""
    return sum(int(size) for prefix, size in matches if prefix == total)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that this process belongs to, from the innermost to the outermost visible group.

    Only groups that have this controller are included in version 1. In version 2, a group may lack the controller.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
        mounts = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return
    group_paths = {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for mount in mounts:
        where, _, what = mount.partition(" - ")
        kind, _, options = what.split(" ")[:3]
        if kind == "cgroup2":
            name = ""
        elif kind == "cgroup" and controller in options.split(","):
            name = controller
        else:
            continue
        if name not in group_paths or ".." in group_paths[name].split(
            "/"
        ):  # the process was moved out of the visible groups
            continue
        top, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in where.split(" ")[3:5])
        # A container sees its own group at the top of the mount, under the same name as in the process's list of groups.
        if Path(group_paths[name]).is_relative_to(top):
            folder = Path(group_paths[name]).relative_to(top)
            mounted = root / point.lstrip("/")
            yield from (mounted / inner for inner in (folder, *folder.parents))


def kib(path: Path, *names: str) -> list[int]:
    """Read fields from a file in /proc, and convert their values from kibibytes to bytes.

    Raises:
        OSError: If the file does not exist.
        KeyError: If a field does not exist.
    """
    values = dict(line.partition(":")[::2] for line in path.read_text("utf-8", "replace").splitlines())
    return [int(values[name].split()[0]) * 1024 for name in names]


def _unused_address_space(mapped: int) -> float:
    import resource  # exists wherever /proc does

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return limit - mapped
