"""Cores and memory under made-up control groups of both versions, and under real ones where this machine allows them."""

import os
from pathlib import Path

import pytest

from evoprune.model.limits import available_cores, available_memory

GIB = 2**30
V1_HUGE = 9_223_372_036_854_771_712  # no limit
V2 = "23 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"


def v1(controllers: str, top: str = "/", point: str | None = None) -> str:
    return f"33 31 0:30 {top} {point or '/sys/fs/cgroup/' + controllers} rw master:9 - cgroup cgroup rw,{controllers}"


def stat(total: bool = False, **sizes: int) -> str:
    own = "".join(f"{name} {size}\n" for name, size in sizes.items())
    return "anon 7\n" + (
        own.replace(" ", " 9") + "".join(f"total_{line}\n" for line in own.splitlines()) if total else own
    )


# What a machine of 16 GiB of free memory is made of: lines of /proc/self/cgroup, mounts, files, and then GiB available.
MEMORY = {
    "no groups": ((), (), {}, 16),
    "version 2, no limit": (("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": "max", "current": GIB, "stat": ""}}, 16),
    "version 2": (("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": 5 * GIB, "current": GIB, "stat": ""}}, 4),
    "cached files can be dropped": (
        ("0::/",), (V2,),
        {"sys/fs/cgroup": {"max": 5 * GIB, "current": 4 * GIB,
                           "stat": stat(active_file=GIB, inactive_file=GIB, inactive_anon=2 * GIB, slab_reclaimable=GIB)}}, 4),
    "the least of a group and those around it": (
        ("0::/a/b/c",), (V2,),
        {"sys/fs/cgroup/a": {"max": 3 * GIB, "current": 2 * GIB, "stat": ""},
         "sys/fs/cgroup/a/b": {"max": "max", "current": 2 * GIB, "stat": ""},
         "sys/fs/cgroup/a/b/c": {"max": 8 * GIB, "current": GIB, "stat": ""}}, 1),
    "slowed down above high": (
        ("0::/a",), (V2,),
        {"sys/fs/cgroup/a": {"max": 5 * GIB, "high": 3 * GIB, "current": GIB, "stat": ""}}, 2),
    "more in use than is allowed": (
        ("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": GIB, "current": 2 * GIB, "stat": ""}}, -1),
    "version 1": (
        ("9:name=systemd:/", "4:memory:/docker/x"), (v1("memory"),),
        {"sys/fs/cgroup/memory": {"limit_in_bytes": V1_HUGE, "usage_in_bytes": GIB, "stat": ""},
         "sys/fs/cgroup/memory/docker/x": {
             "limit_in_bytes": 6 * GIB, "usage_in_bytes": 5 * GIB, "stat": stat(True, active_file=GIB, inactive_file=GIB)}}, 3),
    "version 1, inside the container": (
        ("4:memory:/docker/x",), (v1("memory", "/docker/x"),),
        {"sys/fs/cgroup/memory": {"limit_in_bytes": 6 * GIB, "usage_in_bytes": GIB, "stat": ""}}, 5),
    "a mount of other groups": (
        ("4:memory:/a",), (v1("memory", "/b"),),
        {"sys/fs/cgroup/memory": {"limit_in_bytes": GIB, "usage_in_bytes": 0, "stat": ""}}, 16),
    "both versions, memory in the first": (
        ("4:memory:/a", "1:cpu,cpuacct:/b", "0::/c"),
        (v1("memory"), "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"),
        {"sys/fs/cgroup/memory/a": {"limit_in_bytes": 2 * GIB, "usage_in_bytes": GIB, "stat": ""},
         "sys/fs/cgroup/unified/c": {}}, 1),
    "a name with a space": (
        ("0::/a b",), ("23 1 0:22 / /mnt/my\\040groups rw - cgroup2 none rw",),
        {"mnt/my groups/a b": {"max": 2 * GIB, "current": GIB, "stat": ""}}, 1),
}  # fmt: skip


def made_up(root: Path, groups, mounts, files: dict[str, dict], prefix: str) -> Path:
    """A root folder with these groups and mounts."""
    proc = root / "proc/self"
    proc.mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemFree: 1 kB\nMemAvailable:   {16 * GIB // 1024} kB\n")
    (proc / "status").write_text("VmSize:  1024 kB\n")
    (proc / "cgroup").write_text("".join(f"{line}\n" for line in groups))
    (proc / "mountinfo").write_text("".join(f"{line}\n" for line in ["22 1 0:5 / /dev rw - tmpfs tmpfs rw", *mounts]))
    for folder, contents in files.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            (root / folder / f"{prefix}.{name}").write_text(f"{content}\n")
    return root


@pytest.mark.parametrize("name", MEMORY)
def test_memory_of_control_groups(name, tmp_path):
    *tree, gib = MEMORY[name]
    assert available_memory(made_up(tmp_path, *tree, "memory")) == gib * GIB


CORES = {
    "no groups": ((), (), {}, 8),
    "version 2, no quota": (("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": "max 100000"}}, 8),
    "version 2": (("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": "250000 100000"}}, 3),
    "less than a core": (("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": "20000 100000"}}, 1),
    "more than there are": (("0::/a",), (V2,), {"sys/fs/cgroup/a": {"max": "6400000 100000"}}, 8),
    "of the group around": (
        ("0::/a/b",), (V2,), {"sys/fs/cgroup/a": {"max": "200000 100000"}, "sys/fs/cgroup/a/b": {"max": "max 100000"}}, 2),
    "version 1, no quota": (
        ("1:cpu,cpuacct:/a",), (v1("cpu,cpuacct"),),
        {"sys/fs/cgroup/cpu,cpuacct/a": {"cfs_quota_us": -1, "cfs_period_us": 100000}}, 8),
    "version 1": (
        ("1:cpuacct,cpu:/a", "4:memory:/b"), (v1("memory"), v1("cpu,cpuacct")),
        {"sys/fs/cgroup/cpu,cpuacct/a": {"cfs_quota_us": 400000, "cfs_period_us": 100000}}, 4),
}  # fmt: skip


@pytest.mark.parametrize("name", CORES)
def test_cores_of_control_groups(name, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    *tree, cores = CORES[name]
    assert available_cores(made_up(tmp_path, *tree, "cpu")) == cores


def test_a_system_without_proc(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available_cores(tmp_path) == 6 and available_memory(tmp_path) is None
