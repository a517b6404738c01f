"""Imitate CUDA graphs without a GPU, by recording a function's operations and replaying them on the same tensors."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from tests.waiting import COPYING, shape_depends_on_values

# Operators that copy the group ends to the host: torch's own for all dtypes except bf16, and for bf16 on most GPUs too
# (`_grouped_mm_fallback` in ATen/native/GroupedMMUtils.h), and the one that transformers uses with older versions.
READS_ENDS = ("_grouped_mm", "grouped_mm_fallback")
MAKES = ("lift_fresh", "_to_copy")  # only copies to another dtype may be captured


class Recorder(TorchDispatchMode):
    """Rejects what a capture rejects: reading values, copying between devices, and creating tensors from host values."""

    def __init__(self):
        super().__init__()
        self._ran: list[tuple] = []
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self._own: set[int] = set()  # addresses created by operations

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name.rpartition("::")[2]
        reads = name in READS_ENDS or shape_depends_on_values(func, args, kwargs)
        makes = name in MAKES and "dtype" not in kwargs
        assert not reads and not makes, f"{name} while a graph is captured"
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self._note(given)
        made = func(*args, **kwargs)
        devices = {x.device for x in _tensors((args, made))}
        assert name not in COPYING or len(devices) == 1, f"{name} between {devices} while a graph is captured"
        given = {_storage(x).data_ptr() for x in _tensors((args, kwargs))}
        self._own |= {_storage(x).data_ptr() for x in _tensors(made)} - given
        self._ran.append((func, args, kwargs, made))
        return made

    def _note(self, x: torch.Tensor) -> None:
        whole = _storage(x)
        at = whole.data_ptr()
        if at not in self._own and at not in self._before:
            self._before[at] = whole, whole.clone()

    def undo(self) -> None:
        """Restore the tensors' values, because capturing a real graph runs nothing."""
        for whole, before in self._before.values():
            whole.copy_(before)

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, made in self._ran:
            again = func(*args, **kwargs)
            for old, new in zip(made, again, strict=True) if isinstance(made, tuple) else [(made, again)]:
                if not isinstance(old, torch.Tensor):
                    continue
                assert old.shape == new.shape
                if _values(old).data_ptr() != _values(new).data_ptr():
                    old.copy_(new)


def _tensors(made) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    tree_map_only(torch.Tensor, found.append, made)
    return found


def _values(x: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself, or the wrapped tensor if it is on the second device (tests/second_device/far.py)."""
    return getattr(x, "there", x)


def _storage(x: torch.Tensor) -> torch.UntypedStorage:
    return _values(x).untyped_storage()


class Graphs:
    """A stand-in for the CUDA graphs of `backend.Device`, which records functions instead of capturing them."""

    def __init__(self):
        self.captured = self.replayed = 0

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        self.captured += 1
        with torch.inference_mode(), Recorder() as recorder:
            function()
            made = recorder
        made.undo()

        def replay() -> None:
            self.replayed += 1
            made.replay()

        return replay
