"""The encoder's GPU code path on a CPU: static shapes, an imitated kernel, and an error when the host would wait."""

from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.backend import attention, devices
from evoprune.methods import Merger
from evoprune.vision import encoder
from tests.vision.results import assert_same, check_result, encode_patches
from tests.vision.tower import tiny_tower
from tests.waiting import shape_depends_on_values


class NoWaiting(TorchDispatchMode):
    """Raises an error when the host would wait for a GPU."""

    def __init__(self):
        super().__init__()
        self.allowed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not self.allowed and shape_depends_on_values(func, args, kwargs or {}):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))

    @contextmanager
    def pause(self):
        before, self.allowed = self.allowed, True
        yield
        self.allowed = before


def varlen_by_hand(q, k, v, ends_q, ends_k, longest_q, longest_k, *, scale):
    """Compute the same as `torch.nn.attention.varlen.varlen_attn`, with the checks that flash kernels make."""
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] and q.shape[-1] % 8 == 0 and k.shape == v.shape
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q.is_contiguous() and ends_k.is_contiguous()
    assert all(x.stride(-1) == 1 for x in (q, k, v)) and ends_q.shape == ends_k.shape
    ends_q, ends_k = ends_q.tolist(), ends_k.tolist()
    assert ends_q[0] == ends_k[0] == 0 and ends_q[-1] == len(q) and ends_k[-1] <= len(k)
    out = torch.zeros_like(q)
    for g in range(len(ends_q) - 1):
        queries, keys = slice(*ends_q[g : g + 2]), slice(*ends_k[g : g + 2])
        assert 0 <= queries.stop - queries.start <= longest_q and 0 <= keys.stop - keys.start <= longest_k
        scores = torch.einsum("qhd,khd->hqk", q[queries].double(), k[keys].double()) * scale
        out[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].double()).to(q.dtype)
    return out


def take_gpu_route(monkeypatch, kernel: bool) -> NoWaiting:
    """Make the encoder treat the CPU as a GPU, with or without the kernel. The result is a context manager for the encoder's calls.

    Only two operations may wait for the device: the selection of rows, which checks for a still clip, and the checks at the end.
    """
    mode = NoWaiting()

    def pausing(function):
        def paused(*args, **how):
            with mode.pause():
                return function(*args, **how)

        return paused

    by_hand = pausing(varlen_by_hand)
    monkeypatch.setattr(devices, "is_host", lambda device: False)
    monkeypatch.setattr(attention, "is_host", lambda device: False)
    for where, name in (
        (encoder.TowerOutput, "read_checks"),
        (encoder.EncoderRun, "select_rows"),
    ):
        monkeypatch.setattr(where, name, pausing(getattr(where, name)))
    monkeypatch.setattr(attention.Attention, "varlen_kernel", property(lambda _: by_hand if kernel else None))
    return mode


def assert_same_on_a_gpu(
    monkeypatch, patches, grid, method, keep, kernel, full_layers=(1, 3), piece_units=10**6
) -> None:
    """Encode a video both ways and compare. Raises an error when the host would wait for a GPU."""
    how = {"visual": tiny_tower(full_layers), "piece_units": piece_units}
    expected = encode_patches(patches, grid, method, keep, **how)
    with monkeypatch.context() as patch, take_gpu_route(patch, kernel):
        made = encode_patches(patches, grid, method, keep, **how)
    assert_same(made, expected, atol=1e-4)
    check_result(made, grid, whole_clip=not isinstance(method, Merger))
