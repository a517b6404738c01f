"""A second device, `far`, whose tensors the CPU cannot read, written in Python with torch's PrivateUse1.

It computes on the CPU but has its own memory. Operations that a GPU refuses raise an error: products of tensors on both devices,
and indices on the other device, which torch would copy silently. It has no streams and no kernels of its own: events use the CPU's
clock, and pinned memory is a copy that claims to be pinned. `rename` affects the whole process, so its tests run in a separate one:

    python -m pytest -p tests.second_device.plugin -m device tests/second_device
"""

import sys
import time

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "far"
INDEXING = ("index", "index_put_")  # CPU indices are allowed here, because GPUs copy them and transformers relies on it
COPYING = ("_to_copy", "to", "copy_")
FACTORIES = ("arange", "arange.start", "arange.start_step", "linspace", "eye")
# These would become several operations, including one in `RESHAPING`.
WHOLE = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.einsum, torch.Tensor.quantile}
RESHAPING = ("resize_", "squeeze_", "unsqueeze_", "t_", "transpose_", "set_")  # in place, which a wrapper cannot follow


class Memory:
    """The device's memory: `most` limits the bytes of one tensor, `largest` is the largest tensor so far, in bytes."""

    most: float = float("inf")
    largest: int = 0

    @classmethod
    def take(cls, size: int) -> None:
        cls.largest = max(cls.largest, size)
        if size > cls.most:
            raise torch.OutOfMemoryError(
                f"{NAME} out of memory. Tried to allocate {size / 2**30:.2f} GiB. It has a total capacity of 1.00 GiB of which"
                f" {cls.most / 2**30:.2f} GiB is free."
            )


class Far(torch.Tensor):
    """A tensor on the device. Its values are in `there`."""

    @staticmethod
    def __new__(cls, there: torch.Tensor):
        Memory.take(there.nbytes)
        shape, layout = there.shape, {"strides": there.stride(), "storage_offset": there.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=there.dtype, device=f"{NAME}:0", **layout)

    def __init__(self, there: torch.Tensor):
        self.there = there

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in WHOLE:
            return run(func, args, kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict) -> "Far":
        # `torch.Tensor.__deepcopy__` would clone the storage of the wrapper, which has none, and crash.
        memo[id(self)] = made = Far(self.there.clone())
        return made

    def __repr__(self) -> str:
        return f"Far({self.there})"


class ElsewhereError(RuntimeError):
    """Raised when one operation gets tensors of both devices."""


def run(func, args: tuple, kwargs: dict):
    name = "matmul" if func in WHOLE else func._schema.name.removeprefix("aten::")
    if name in RESHAPING:
        raise NotImplementedError(f"{name} of a tensor on {NAME}")
    given: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, given.append, (args, kwargs))
    here = [x for x in given if not isinstance(x, Far)]
    foreign = (
        name in INDEXING
        and "/transformers/" in sys._getframe(2).f_code.co_filename + sys._getframe(3).f_code.co_filename
    )
    if name not in COPYING and not foreign and any(x.ndim for x in here):
        raise ElsewhereError(f"{func} of tensors on {NAME} and on the CPU: {[tuple(x.shape) for x in given]}")
    targets = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
    stays = all(target.type == NAME for target in targets)
    args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    args, kwargs = tree_map_only(Far, lambda x: x.there, (args, kwargs))
    if name == "histc":  # integers, which the CPU's histc does not support
        args = args[0].float(), *args[1:]
    made, known = func(*args, **kwargs), {id(x.there): x for x in given if isinstance(x, Far)}

    def outside(x: torch.Tensor) -> torch.Tensor:
        if not stays:
            return x.clone() if id(x) in known else x
        if id(x) in known:
            assert known[id(x)].shape == x.shape, f"{func} resizes what it writes into"
            return known[id(x)]
        return x if any(x is one for one in here) else Far(x)

    return tree_map_only(torch.Tensor, outside, made)


def _made(func):
    """Wrap a factory function whose composite form would resize a tensor of the device."""

    def make(*given, device=None, pin_memory=None, layout=None, **how) -> Far:
        return Far(func(*given, **how, device="cpu"))

    return make


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None) -> Far:
    return Far(torch.empty(size, dtype=dtype, device="cpu"))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None) -> Far:
    return Far(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))


def _copy_from(source: torch.Tensor, to: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """Copy between devices for callers below `__torch_dispatch__`, such as `torch.tensor`."""
    (to.there if isinstance(to, Far) else to).copy_(source.there if isinstance(source, Far) else source)
    return to


class Event:
    """Replacement for device events, with the CPU's clock."""

    def __init__(self, device=None, enable_timing: bool = False):
        self._at = None

    def record(self, stream=None) -> None:
        self._at = time.perf_counter()

    def synchronize(self) -> None:
        """Do nothing, because the device executes all operations synchronously."""

    def elapsed_time(self, end: "Event") -> float:
        return (end._at - self._at) * 1000


def _pinned(x: torch.Tensor, device=None) -> torch.Tensor:
    made = x.clone()
    made.is_pinned_for_far = True
    return made


_library = torch.library.Library("aten", "IMPL")


def register() -> None:
    """Register the device with torch, once per process."""
    _setup_privateuseone_for_python_backend(NAME)
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    for name in FACTORIES:
        packet, _, overload = name.partition(".")
        _library.impl(name, _made(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    _library.impl("_local_scalar_dense", lambda x: x.there.item(), "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    torch.Event = Event
    torch.accelerator.current_stream = lambda device=None: None
    torch.accelerator.synchronize = lambda device=None: None
    torch.Tensor.pin_memory = _pinned
    torch.Tensor.is_pinned = lambda x, device=None: getattr(x, "is_pinned_for_far", False)
