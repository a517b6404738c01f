"""Finds out how many cores, how much memory and which devices this process may use. Does not import torch.

Containers limit cores and memory with control groups (cgroups v1, v2, or both). A limit applies to a control group and to all
groups nested in it. If the file for a limit is missing from a group's folder, the group does not set that limit.
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
# Options for glibc's mallopt. The allocator returns free memory above the trim threshold to the system, and requests new pages for
# every block larger than the mmap threshold. If the maximum number of arenas is 1, all threads share one arena.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
ARENA_MAX = -8
MALLOC = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26, MMAP_THRESHOLD: 2**30, ARENA_MAX: 1}

# Pairs of files in a control group's folder: the memory limit and the memory in use, both in bytes. The kernel does not kill
# processes in a group that exceeds `memory.high`, but it slows them to a crawl.
MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Matches the fields of memory.stat that count memory the system can reclaim when it runs low: cached files, including mapped ones.
# In cgroups v1, only the fields that begin with `total_` include the groups inside this group.
RECLAIMABLE = re.compile(r"^(total_)?(?:active_file|inactive_file|slab_reclaimable) (\d+)$", re.MULTILINE)

# Files whose presence shows that the GPU driver for a toolkit is installed. The last pattern for each toolkit is for WSL.
DRIVERS = {
    "cuda": ("dev/nvidia[0-9]*", "dev/nvmap", "usr/lib/wsl/lib/libcuda.so*"),
    "hip": ("dev/kfd", "dev/dxg"),
}
# Matches the lines in torch's `version` module that reveal the toolkit that torch was built with.
BUILT_WITH = re.compile(r"^(cuda|hip)\b[^=]*=\s*['\"]", re.MULTILINE)
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
VISIBLE = re.compile(r"\s*(\d|GPU-|MIG-)")  # matches values of these variables that leave at least one GPU visible
# The number of visual tokens (before pruning) that a CPU can encode in about a minute.
MAX_VISUAL_TOKENS_CPU = 4_096
# With fewer units than this, the vision tower is launch-bound on CUDA, so its run time hardly depends on the number of rows. The
# threshold was chosen from measurements on one H200 (results/gpu.md, "Small inputs"). At 384 units, pruning inside the tower was
# slower than not pruning at all (0.73 to 0.99 times as fast). At 1,536 units, it was slower than selecting after the tower (by 9%,
# calculated). At 4,784 units, it was 1.6 times as fast as selecting after the tower. No sizes in between were measured, so the
# threshold is close to the largest size at which pruning inside the tower was slower.
LAUNCH_BOUND_UNITS = {"cuda": 2048}


class DeviceName:
    """The name of a device, and what can be derived from it without importing torch.

    Args:
        name: The value of the device option: "auto", or the name of a torch device such as "cuda:1".
    """

    def __init__(self, name: str):
        self.name = name
        self._kind = name.partition(":")[0]

    def resolve(self, root: Path = ROOT) -> str:
        """Return the name of the device to use.

        "auto" resolves to "cuda" if torch was built for GPUs, a matching driver is installed, and the environment does not hide the
        GPU. Otherwise, it resolves to "cpu". If torch later cannot use the GPU, loading a model raises an error instead of falling
        back to the CPU (see `pick_device`).
        """
        if self.name != "auto":
            return self.name
        hidden = any(variable in os.environ and not VISIBLE.match(os.environ[variable]) for variable in VISIBLE_DEVICES)
        return "cpu" if hidden or not _has_gpu(root) else "cuda"

    @property
    def visual_token_limit(self) -> float:
        """The maximum number of visual tokens before pruning. Infinity means that the device sets no limit."""
        return MAX_VISUAL_TOKENS_CPU if self._kind == "cpu" else math.inf

    @property
    def launch_bound_units(self) -> int:
        """The number of units below which the vision tower is launch-bound on this device, or 0 if it never is."""
        return LAUNCH_BOUND_UNITS.get(self._kind, 0)

    def cluster_share(self, gpus: int, cores: Sequence[int]) -> tuple[int, dict[str, float]]:
        """Return how many model processes fit on a Ray cluster, and the resources that each process requests from Ray.

        If the models run on GPUs, each process gets one GPU. Otherwise, each process gets as many cores as the smallest node has.

        Args:
            gpus: The number of GPUs in the whole cluster.
            cores: The number of cores on each node.
        """
        if self.name.startswith("cuda") or (self.name == "auto" and gpus):
            return max(1, gpus), {"num_gpus": 1}
        min_cores = min((count for count in cores if count), default=1)
        return max(1, sum(count // min_cores for count in cores)), {"num_cpus": min_cores}


def _has_gpu(root: Path) -> bool:
    """Return True if the driver for a GPU that the installed torch supports is present.

    On systems without /dev, such as Windows, the driver cannot be checked, so a torch that was built for GPUs is enough.
    """
    toolkits = _toolkits()
    if not (root / "dev").is_dir():
        return bool(toolkits)
    files = (file for toolkit in toolkits for pattern in DRIVERS[toolkit] for file in root.glob(pattern))
    return any(os.access(file, os.R_OK) for file in files)  # a control group may forbid a device


def _toolkits() -> list[str]:
    """Return the GPU toolkits that torch was built with ("cuda", "hip"), or all known toolkits if this cannot be determined."""
    try:
        folders = find_spec("torch").submodule_search_locations
        return BUILT_WITH.findall(Path(folders[0], "version").with_suffix(".py").read_text(encoding="utf-8"))
    except (AttributeError, TypeError, IndexError, OSError, ValueError):  # torch is frozen or has a different layout
        return list(DRIVERS)


class Host:
    """Reports how many cores and how much memory this process may use.

    Args:
        root: The file system root, under which /proc and the control groups are mounted.
    """

    def __init__(self, root: Path = ROOT):
        self._root = root

    def available_cores(self) -> int:
        """Return the number of CPU cores that this process may keep busy, which is at least 1.

        This is the number of cores in the process's CPU affinity mask, or its control groups' CPU quota if that is lower. The quota
        is rounded up to whole cores.
        """
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        folders = _groups("cpu", self._root)
        quota = min((quota for folder in folders for quota in _quotas(folder)), default=math.inf)
        return max(1, math.ceil(min(cores, quota)))

    def available_memory(self) -> int | None:
        """Return the number of bytes that this process can allocate without swapping, or None if the number is unknown.

        This is the lowest of three values: the memory that Linux reports as available, the memory left in the process's control
        groups, and the address space left under `ulimit -v`. Cached files count as available memory, because the system evicts them
        when memory runs low.
        """
        try:
            (free,) = kib(self._root / "proc/meminfo", "MemAvailable")
            (mapped,) = kib(self._root / "proc/self/status", "VmSize")
        except (OSError, KeyError):
            return None
        groups = (unused for folder in _groups("memory", self._root) for unused in _unused_memory(folder))
        return min(free, _unused_address_space(mapped), *groups)

    def oom_kills(self) -> int:
        """Return how many processes the kernel has killed so far because memory ran out, or 0 if the number is unknown.

        The number covers the whole machine, not only the control groups of this process.
        """
        with suppress(OSError, ValueError, StopIteration), (self._root / "proc/vmstat").open() as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        return 0


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system. With other C libraries, this does nothing.

    By default, glibc returns the memory of each layer's results to the system and requests new pages for the next layer, which
    takes up to an eighth of the encoding time of a 3B model in bf16 (results/machines.md). Call this function only in processes
    that belong to evoprune, because the process then holds on to its peak memory.
    """
    import ctypes  # imported here so that --help does not load it

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOC.items():
            libc.mallopt(option, value)


def _quotas(folder: Path) -> Iterator[float]:
    """Yield each CPU quota that is set in a control group's folder, in cores."""
    with suppress(OSError, ValueError):  # "max" means no limit
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:  # -1 means no limit
            yield quota / period


def _unused_memory(folder: Path) -> Iterator[int]:
    """Yield the number of bytes that can still be allocated under each memory limit of a control group."""
    for limit, used in MEMORY:
        with suppress(OSError, ValueError):  # "max" means no limit
            unused = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield unused + _reclaimable((folder / "memory.stat").read_text())


def _reclaimable(stat: str) -> int:
    matches = RECLAIMABLE.findall(stat)
    total = "total_" if any(prefix for prefix, _ in matches) else ""
    return sum(int(size) for prefix, size in matches if prefix == total)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of the control groups that contain this process, from the innermost to the outermost visible group.

    With cgroups v1, the requested controller is enabled in all of these groups. With v2, some of the groups may lack it.
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
        # In a container, the mount starts at the container's own group, whose path is the same as in the process's list of groups.
        if Path(group_paths[name]).is_relative_to(top):
            folder = Path(group_paths[name]).relative_to(top)
            mounted = root / point.lstrip("/")
            yield from (mounted / inner for inner in (folder, *folder.parents))


def kib(path: Path, *names: str) -> list[int]:
    """Read fields of a file in /proc and convert their values from KiB to bytes.

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
