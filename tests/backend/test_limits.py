"""Test the limits that control groups set, using made-up groups of both versions and, if this machine allows it, real groups."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from evoprune.backend.limits import ROOT, Host, _groups
from evoprune.bundled import DEMOS
from evoprune.model import QwenVL
from evoprune.session import BUNDLED_CONFIGS, ModelOptions, describe
from tests.quantized import parameters
from tests.video.files import write_video

GIB = 2**30
CLIP = "samples/square.mp4"
V1_HUGE = 9_223_372_036_854_771_712  # no limit
V2 = "23 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw"


def v1(controllers: str, top: str = "/", point: str | None = None) -> str:
    return f"33 31 0:30 {top} {point or '/sys/fs/cgroup/' + controllers} rw master:9 - cgroup cgroup rw,{controllers}"


def stat(total: bool = False, **sizes: int) -> str:
    """Return the contents of a memory.stat file. With `total`, the sizes of the group itself differ from the totals."""
    lines = [f"{name} {size}\n" for name, size in sizes.items()]
    return "anon 7\n" + "".join([line.replace(" ", " 9") + f"total_{line}" if total else line for line in lines])


# Parts of a machine with 16 GiB of free memory: lines of /proc/self/cgroup, mounts, files; then the GiB available.
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
    assert Host(made_up(tmp_path, *tree, "memory")).available_memory() == gib * GIB


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
    assert Host(made_up(tmp_path, *tree, "cpu")).available_cores() == cores


def test_a_system_without_proc(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert Host(tmp_path).available_cores() == 6 and Host(tmp_path).available_memory() is None


@pytest.fixture
def limited():
    """Return a function that runs a Python program in a new control group, given a controller and its settings."""
    made = []

    def run(controller: str, limits: dict[str, object], *arguments: str) -> subprocess.CompletedProcess:
        own = next(_groups(controller, ROOT), None)
        if own is None:
            pytest.skip("no control groups")
        group = own / f"evoprune-{os.getpid()}"
        try:
            group.mkdir()
            made.append(group)
            known = {name: value for name, value in limits.items() if (group / name).exists()}
            for name, value in known.items():
                (group / name).write_text(str(value))
        except OSError as problem:
            pytest.skip(f"no control group can be made: {problem}")
        if not known:
            pytest.skip(f"groups here have no {controller} controller")
        enter = ("sh", "-c", 'echo $$ > "$0" || exit 99; exec "$@"', str(group / "cgroup.procs"))
        command = [*enter, sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
        if done.returncode == 99:
            pytest.skip(f"the group cannot be entered: {done.stderr}")
        return done

    yield run
    for group in made:
        for _ in range(50):  # the group is busy until its last process has ended
            with suppress(OSError):
                group.rmdir()
                break
            time.sleep(0.1)


def test_a_real_quota(limited):
    limits = {"cpu.cfs_quota_us": 150_000, "cpu.max": "150000 100000"}
    done = limited("cpu", limits, "-c", "from evoprune.backend.limits import Host; print(Host().available_cores())")
    assert done.stdout == f"{min(2, Host().available_cores())}\n", done.stderr


def memory_limit(size: int) -> dict[str, object]:
    return {"memory.limit_in_bytes": size, "memory.max": size, "memory.swap.max": 0}


def empty_checkpoint(folder: Path) -> None:
    """Write a checkpoint that has the dimensions of the 3B model but only zeros, as a sparse file of 7 GiB."""
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    config = BUNDLED_CONFIGS[name]
    for path in (config, *DEMOS["demo"].folder.glob("*token*.json"), DEMOS["demo"].folder / "chat_template.jinja"):
        shutil.copy(path, folder / ("config.json" if path == config else path.name))
    header, end = {}, 0
    model = QwenVL.empty(describe(ModelOptions(name, load_format="dummy")).config)
    for name, weight in model.to(torch.bfloat16).state_dict().items():
        if name != "lm_head.weight":  # tied
            header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + weight.nbytes]}
            end += weight.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.full
@pytest.mark.parametrize(
    ("limit", "found", "hint"),
    [(5 * GIB, r"loading .* needs about 7\.0 GiB of memory, and 4\.\d GiB are available", "quantize"),
     (150 * 2**20, r"too little memory: \d+ MiB are available", "container")],
    ids=["smaller than the weights", "smaller than the libraries"],
)  # fmt: skip
def test_a_container_that_is_too_small(limited, tmp_path, limit, found, hint):
    """The command exits with code 5 and a hint, rather than being killed silently by the system."""
    empty_checkpoint(tmp_path)
    if Host().available_memory() < 9 * GIB:
        pytest.skip("this machine itself has too little memory free")
    ask = f"-m evoprune_cli ask samples/square.mp4 What -q -m {tmp_path} --dtype bf16"
    done = limited("memory", memory_limit(limit), *ask.split())
    error, advice = done.stderr.splitlines()
    assert done.returncode == 5 and hint in advice
    assert re.fullmatch(f"error: {found}.*", error)


@pytest.mark.full
@pytest.mark.parametrize("kind", parameters("int8"))
def test_a_3b_model_answers_inside_5_and_a_half_gb(limited, tmp_path, monkeypatch, kind):
    """The weights would take 15 GB in fp32. The file's mapped pages count as well, but the system can evict them."""
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))  # for 3.5 GiB of quantized weights
    empty_checkpoint(tmp_path)
    arguments = ("-m", str(tmp_path), "--dtype", "fp32", "--quantize", kind, "--frames", "2", "-n", "2", "--json")
    done = limited("memory", memory_limit(5_500_000_000), "-m", "evoprune_cli", "ask", CLIP, "What?", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["memory"]["own_bytes"] < 4.5 * GIB


READ = """
from evoprune.video.frames import read_chunks
from evoprune.video.frames import probe
from evoprune.errors import OutOfMemory
try:
    print(sum(len(chunk.pixels) for chunk in read_chunks(probe("{path}"), [0.0, 0.3, 0.6, 0.9])))
except OutOfMemory as problem:
    print(problem.stage, problem.message)
"""


@pytest.mark.full
def test_a_decoder_that_the_system_ends(limited, tmp_path):
    """Decoding the image takes 100 MiB, which is more than the control group allows."""
    path = tmp_path / "large.mkv"
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    write_video(path, [np.tile(frame, (64, 128, 1))], codec="mjpeg", pix_fmt="yuvj444p")
    done = limited("memory", memory_limit(140 * 2**20), "-c", READ.format(path=path))
    assert done.stdout == f"read out of memory: the system ended the decoder of {path}\n", done.stderr


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc"
)
@pytest.mark.parametrize("kept", [False, True])
def test_freed_memory_is_kept_where_that_was_asked_for(kept):
    """The test runs in a separate process, and not in its first thread."""
    code = f"""
import threading
from pathlib import Path
import numpy as np
from evoprune.backend.limits import keep_freed_memory, kib

def own():
    return kib(Path("/proc/self/status"), "RssAnon")[0]

def work():
    before = own()
    for size in (2**24, 2**26, 2**27):
        np.ones(size, np.uint8)
    print(own() - before)

if {kept}:
    keep_freed_memory()
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (int(made.stdout) > 2**26) == kept
