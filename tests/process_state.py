"""Snapshots of the process state that a library must leave unchanged."""

import locale
import logging
import multiprocessing
import os
import signal
import sys
import threading
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None


# Environment variables that other packages set on their own when a test uses them.
SET_BY_OTHERS = {
    "PYTEST_CURRENT_TEST",  # pytest
    "TORCHINDUCTOR_CACHE_DIR", "CUBLAS_WORKSPACE_CONFIG",  # torch's compiler, on import
    "CUDA_MODULE_LOADING",  # older releases of torch, on first use of CUDA
    "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK",  # scikit-learn, which transformers imports if it is installed
}  # fmt: skip


def process_state() -> dict:
    """Return scheduling, limits, signal handlers, locale, and the defaults of Python and torch, by name."""
    state = {
        "signals": {each.name: signal.getsignal(each) for each in signal.valid_signals() if hasattr(each, "name")},
        "locale": locale.setlocale(locale.LC_ALL),
        "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in SET_BY_OTHERS} | {"PATH": _path()},
        "path": list(sys.path),
        "hooks": (sys.excepthook, sys.unraisablehook, threading.excepthook),
        "start method": multiprocessing.get_start_method(),
        "logging": (logging.root.level, logging.raiseExceptions, logging.root.manager.disable),
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "autocast": torch.is_autocast_enabled("cpu"),
        "matmul precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    if resource is not None:
        names = [name for name in dir(resource) if name.startswith("RLIMIT_")]
        state["limits"] = {name: resource.getrlimit(getattr(resource, name)) for name in names}
        state["nice"] = os.getpriority(os.PRIO_PROCESS, 0)
    if hasattr(os, "sched_getscheduler"):
        state["affinity"] = os.sched_getaffinity(0)
        state["scheduling"] = scheduling()
    return state


def _path() -> list[str]:
    """Return PATH without the folder that decord adds on import. The product imports decord only in separate processes."""
    return [folder for folder in os.environ.get("PATH", "").split(os.pathsep) if Path(folder).name != "decord"]


def scheduling() -> set[tuple[int, int]]:
    """Return the scheduling class and priority of each thread of this process: {(0, 0)} if all are ordinary."""
    found = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.add((os.sched_getscheduler(int(task.name)), os.sched_getparam(int(task.name)).sched_priority))
        except ProcessLookupError:  # the thread has ended
            continue
    return found


def differences(before: dict, after: dict) -> list[str]:
    """Return one line per changed entry."""
    lines = []
    for name in before:
        if before[name] != after[name]:
            old, new = before[name], after[name]
            if isinstance(old, dict):
                keys = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
                old, new = ({key: state.get(key) for key in keys} for state in (old, new))
            lines.append(f"{name}: {old} became {new}")
    return lines
