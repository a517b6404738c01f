"""Determines which cores, memory, and devices are available to this process, without importing torch.

Containers limit cores and memory with control groups (cgroups v1, v2, or both). A limit applies to a control group and all of its
descendants. A missing limit file in a group's folder means that the group doesn't set this limit.
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
# each block larger than the mmap threshold. With a maximum of 1 arena, all threads share it.
TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
ARENA_MAX = -8
MALLOC = {TRIM_THRESHOLD: 2**31 - 1, TOP_PAD: 2**26, MMAP_THRESHOLD: 2**30, ARENA_MAX: 1}

# File pairs in a control group's folder: the memory limit and the memory usage, both in bytes. The kernel doesn't kill processes in
# a group that exceeds `memory.high`, but it throttles them heavily.
MEMORY = (
    ("memory.max", "memory.current"),
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
)
# Matches the memory.stat fields that count reclaimable memory: cached files, including mapped ones. In cgroups v1, only the fields
# starting with `total_` include nested groups.
RECLAIMABLE = re.compile(r"^(total_)?(?:active_file|inactive_file|slab_reclaimable) (\d+)$", re.MULTILINE)

# Files that indicate an installed GPU driver, by toolkit. The last pattern for each toolkit is for WSL.
DRIVERS = {
    "cuda": ("dev/nvidia[0-9]*", "dev/nvmap", "usr/lib/wsl/lib/libcuda.so*"),
    "hip": ("dev/kfd", "dev/dxg"),
}
# Matches the lines in torch's `version` module that specify the toolkit torch was built with.
BUILT_WITH = re.compile(r"^(cuda|hip)\b[^=]*=\s*['\"]", re.MULTILINE)
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
VISIBLE = re.compile(r"\s*(\d|GPU-|MIG-)")  # matches variable values that leave at least one GPU visible
# Number of visual tokens (before pruning) that a CPU can encode in about a minute.
MAX_VISUAL_TOKENS_CPU = 4_096
# With fewer units than this, the vision tower is launch-bound on CUDA, so its run time hardly depends on the number of rows. The
# threshold was chosen from measurements on one H200 (results/gpu.md, "Small inputs"). At 384 units, pruning inside the tower was
# slower than not pruning at all (0.73 to 0.99 times as fast). At 1,536 units, it was slower than selecting after the tower (by 9%,
# calculated). At 4,784 units, it was 1.6 times as fast as selecting after the tower. No sizes in between were measured, so the
# threshold is close to the largest size at which pruning inside the tower was slower.
LAUNCH_BOUND_UNITS = {"cuda": 2048}


class DeviceName:
    """A device name, with properties that can be derived from it without importing torch.

    Args:
        name: The value of the device option: "auto" or a torch device name such as "cuda:1".
    """

    def __init__(self, name: str):
        self.name = name
        self._kind = name.partition(":")[0]

    def resolve(self, root: Path = ROOT) -> str:
        """Return the name of the device to use.

        "auto" resolves to "cuda" if torch was built for GPUs, a matching driver is installed, and no environment variable hides the
        GPU; otherwise, to "cpu". If torch can't use the GPU later, loading a model raises an error instead of falling back to the
        CPU (see `pick_device`).
        """
        if self.name != "auto":
            return self.name
        hidden = any(variable in os.environ and not VISIBLE.match(os.environ[variable]) for variable in VISIBLE_DEVICES)
        return "cpu" if hidden or not _has_gpu(root) else "cuda"

    @property
    def runs_experts(self) -> bool:
        """Whether evoprune's own layers run mixtures of experts on this device."""
        return self.resolve().partition(":")[0] == "cpu"

    def available_memory(self) -> int | None:
        """Return the memory available for weights, in bytes. It is None for a GPU, because asking it requires torch."""
        return Host().available_memory() if self.resolve().partition(":")[0] == "cpu" else None

    @property
    def visual_token_limit(self) -> float:
        """Maximum number of visual tokens before pruning, or infinity if the device imposes no limit."""
        return MAX_VISUAL_TOKENS_CPU if self._kind == "cpu" else math.inf

    @property
    def launch_bound_units(self) -> int:
        """Number of units below which the vision tower is launch-bound on this device, or 0 if it never is."""
        return LAUNCH_BOUND_UNITS.get(self._kind, 0)

    def cluster_share(self, gpus: int, cores: Sequence[int]) -> tuple[int, dict[str, float]]:
        """Return the number of model processes that fit on a Ray cluster, and the Ray resources requested by each process.

        On GPUs, each process is assigned one GPU. Otherwise, each process is assigned as many cores as the smallest node has.

        Args:
            gpus: The total number of GPUs in the cluster.
            cores: The number of cores on each node.
        """
        if self.name.startswith("cuda") or (self.name == "auto" and gpus):
            return max(1, gpus), {"num_gpus": 1}
        min_cores = min((count for count in cores if count), default=1)
        return max(1, sum(count // min_cores for count in cores)), {"num_cpus": min_cores}


def _has_gpu(root: Path) -> bool:
    """Return True if a driver is present for a GPU supported by the installed torch build.

    On systems without /dev, such as Windows, the driver can't be checked, so any GPU build of torch returns True.
    """
    toolkits = _toolkits()
    if not (root / "dev").is_dir():
        return bool(toolkits)
    files = (file for toolkit in toolkits for pattern in DRIVERS[toolkit] for file in root.glob(pattern))
    return any(os.access(file, os.R_OK) for file in files)  # a control group may block access to a device


def _toolkits() -> list[str]:
    """Return the GPU toolkits that torch was built with ("cuda", "hip"), or all known toolkits if they can't be determined."""
    try:
        folders = find_spec("torch").submodule_search_locations
        return BUILT_WITH.findall(Path(folders[0], "version").with_suffix(".py").read_text(encoding="utf-8"))
    except (AttributeError, TypeError, IndexError, OSError, ValueError):  # torch is frozen or has a different layout
        return list(DRIVERS)


class Host:
    """Reports the number of cores and the amount of memory available to this process.

    Args:
        root: The file system root under which /proc and the control groups are mounted.
    """

    def __init__(self, root: Path = ROOT):
        self._root = root

    def available_cores(self) -> int:
        """Return the number of CPU cores available to this process (at least 1).

        This is the number of cores in the CPU affinity mask or the control groups' CPU quota, whichever is lower. The quota is
        rounded up to whole cores.
        """
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        folders = _groups("cpu", self._root)
        quota = min((quota for folder in folders for quota in _quotas(folder)), default=math.inf)
        return max(1, math.ceil(min(cores, quota)))

    def available_memory(self) -> int | None:
        """Return the amount of memory, in bytes, that this process can allocate without swapping, or None if unknown.

        This is the lowest of three values: the available memory reported by Linux, the memory remaining in the process's control
        groups, and the address space remaining under `ulimit -v`. Cached files are treated as available memory because the system
        evicts them when memory runs low.
        """
        try:
            (free,) = kib(self._root / "proc/meminfo", "MemAvailable")
            (mapped,) = kib(self._root / "proc/self/status", "VmSize")
        except (OSError, KeyError):
            return None
        groups = (unused for folder in _groups("memory", self._root) for unused in _unused_memory(folder))
        return min(free, _unused_address_space(mapped), *groups)

    def oom_kills(self) -> int:
        """Return the number of processes that the kernel's OOM killer has terminated so far, or 0 if unknown.

        The count covers the whole machine, not just the control groups of this process.
        """
        with suppress(OSError, ValueError, StopIteration), (self._root / "proc/vmstat").open() as file:
            return next(int(line.split()[1]) for line in file if line.startswith("oom_kill "))
        return 0


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system. This does nothing with other C libraries.

    By default, glibc returns each layer's output memory to the system and requests new pages for the next layer. With a 3B model in
    bf16, this takes up to an eighth of the encoding time (results/machines.md). Only call this function in evoprune's own
    processes, because the process then keeps its peak memory.
    """
    import ctypes  # imported here so that --help doesn't load it

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        for option, value in MALLOC.items():
            libc.mallopt(option, value)


def _quotas(folder: Path) -> Iterator[float]:
    """Yield the CPU quotas set in a control group's folder, in cores."""
    with suppress(OSError, ValueError):  # "max" means no limit
        quota, period = map(int, (folder / "cpu.max").read_text().split())
        yield quota / period
    with suppress(OSError, ValueError):
        quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        if quota > 0:  # -1 means no limit
            yield quota / period


def _unused_memory(folder: Path) -> Iterator[int]:
    """Yield the number of bytes remaining under each memory limit of a control group."""
    for limit, used in MEMORY:
        with suppress(OSError, ValueError):  # "max" means no limit
            unused = int((folder / limit).read_text()) - int((folder / used).read_text())
            yield unused + _reclaimable((folder / "memory.stat").read_text())


def _reclaimable(stat: str) -> int:
    matches = RECLAIMABLE.findall(stat)
    total = "total_" if any(prefix for prefix, _ in matches) else ""
    return sum(int(size) for prefix, size in matches if prefix == total)


def _groups(controller: str, root: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups, from the innermost to the outermost visible group.

    With cgroups v1, all of these groups have the requested controller enabled. With v2, some of them may lack it.
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
        ):  # the process was moved outside the visible groups
            continue
        top, point = (re.sub(r"\\(\d{3})", lambda code: chr(int(code[1], 8)), field) for field in where.split(" ")[3:5])
        # In a container, the mount starts at the container's own group, with the same path as in the process's list of groups.
        if Path(group_paths[name]).is_relative_to(top):
            folder = Path(group_paths[name]).relative_to(top)
            mounted = root / point.lstrip("/")
            yield from (mounted / inner for inner in (folder, *folder.parents))


def kib(path: Path, *names: str) -> list[int]:
    """Read fields of a file in /proc and convert their values from KiB to bytes.

    Raises:
        OSError: If the file doesn't exist.
        KeyError: If a field doesn't exist.
    """
    values = dict(line.partition(":")[::2] for line in path.read_text("utf-8", "replace").splitlines())
    return [int(values[name].split()[0]) * 1024 for name in names]


def _unused_address_space(mapped: int) -> float:
    if sys.platform == "win32":
        return math.inf
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    return limit - mapped
