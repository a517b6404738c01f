"""The operator of backend/reuse.py as a kernel of Triton: one program goes through all frame pairs."""

import struct

import torch
import triton
import triton.language as tl


def _bits(x: float) -> int:
    """The bits of a positive float32 as a whole number: of larger numbers it is larger."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


@triton.jit
def _gain(now, then, inside, low: tl.constexpr, high: tl.constexpr, halvings: tl.constexpr):
    """The median of now / then, weighted by then, between two numbers given by their bits; it is found by halving."""
    ratio = tl.where(inside, now / tl.maximum(then, 1e-3), float("inf"))
    bits = ratio.to(tl.int32, bitcast=True)
    least, half = tl.min(bits, 0), tl.sum(then, 0) / 2
    a, b = tl.min(bits, 0) * 0 + low, tl.min(bits, 0) * 0 + high
    for _ in range(halvings):
        middle = (a + b) // 2
        weight = tl.sum(tl.where(bits <= middle, then, 0.0), 0)
        enough = tl.where(weight >= half, 1, 0) * tl.where(least <= middle, 1, 0)
        b = tl.where(enough > 0, middle, b)
        a = tl.where(enough > 0, a, middle + 1)
    return b.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["pairs", "units", "seen", "known", "threshold"])
def _scan(
    means, now_mean, held, held_mean, pair, source, pairs, units, seen, known, threshold,
    low: tl.constexpr, high: tl.constexpr, halvings: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    u = tl.arange(0, block)
    inside = u < units
    latest = tl.load(pair + u, mask=inside, other=0)
    then_0 = tl.load(held_mean + u, mask=inside, other=0.0)
    then_1 = tl.load(held_mean + units + u, mask=inside, other=0.0)
    then_2 = tl.load(held_mean + 2 * units + u, mask=inside, other=0.0)
    for t in range(0, pairs):
        at = now_mean + t * 3 * units + u
        now_0 = tl.load(at, mask=inside, other=0.0)
        now_1 = tl.load(at + units, mask=inside, other=0.0)
        now_2 = tl.load(at + 2 * units, mask=inside, other=0.0)
        gain_0 = _gain(now_0, then_0, inside, low, high, halvings)
        gain_1 = _gain(now_1, then_1, inside, low, high, halvings)
        gain_2 = _gain(now_2, then_2, inside, low, high, halvings)
        here = means + t * 3 * blocks * units + u
        adjusted = tl.zeros((block,), tl.float32)
        plain = tl.zeros((block,), tl.float32)
        for b in range(blocks):
            n_0 = tl.load(here + (3 * b) * units, mask=inside, other=0.0)
            n_1 = tl.load(here + (3 * b + 1) * units, mask=inside, other=0.0)
            n_2 = tl.load(here + (3 * b + 2) * units, mask=inside, other=0.0)
            h_0 = tl.load(held + u + (3 * b) * units, mask=inside, other=0.0)
            h_1 = tl.load(held + u + (3 * b + 1) * units, mask=inside, other=0.0)
            h_2 = tl.load(held + u + (3 * b + 2) * units, mask=inside, other=0.0)
            d_0, d_1, d_2 = n_0 - h_0 * gain_0, n_1 - h_1 * gain_1, n_2 - h_2 * gain_2
            adjusted = tl.maximum(adjusted, d_0 * d_0 + d_1 * d_1 + d_2 * d_2)
            d_0, d_1, d_2 = n_0 - h_0, n_1 - h_1, n_2 - h_2
            plain = tl.maximum(plain, d_0 * d_0 + d_1 * d_1 + d_2 * d_2)
        changed = tl.where(tl.sqrt(adjusted) >= threshold, 1, 0)
        cut = tl.where(2 * tl.sum(tl.where(inside, changed, 0), 0) > units, 1, 0)
        begins = tl.where(t + known == 0, 1, 0)
        changed = tl.where(cut > 0, tl.where(tl.sqrt(plain) >= threshold, 1, 0), changed)
        changed = tl.where(begins > 0, 1, changed)
        whole = cut + begins
        gain_0 = tl.where(whole > 0, 1.0, gain_0)
        gain_1 = tl.where(whole > 0, 1.0, gain_1)
        gain_2 = tl.where(whole > 0, 1.0, gain_2)
        goes = inside & (changed > 0)
        for b in range(blocks):
            tl.store(
                held + u + (3 * b) * units, tl.load(here + (3 * b) * units, mask=goes, other=0.0) / gain_0, mask=goes
            )
            tl.store(
                held + u + (3 * b + 1) * units,
                tl.load(here + (3 * b + 1) * units, mask=goes, other=0.0) / gain_1,
                mask=goes,
            )
            tl.store(
                held + u + (3 * b + 2) * units,
                tl.load(here + (3 * b + 2) * units, mask=goes, other=0.0) / gain_2,
                mask=goes,
            )
        tl.debug_barrier()
        then_0 = tl.where(changed > 0, now_0 / gain_0, then_0)
        then_1 = tl.where(changed > 0, now_1 / gain_1, then_1)
        then_2 = tl.where(changed > 0, now_2 / gain_2, then_2)
        latest = tl.where(changed > 0, seen + t, latest)
        tl.store(source + t * units + u, latest, mask=inside)
    tl.store(pair + u, latest, mask=inside)


def reuse_scan(means, held, pair, known, seen, threshold, blocks, channels, most):
    """`most`: the greatest drift of brightness. Other arguments as of the operator, and of backend/reuse.py."""
    count, units, _ = means.shape
    low, high = _bits(1 / most), _bits(most)
    by_channel = (-1, units, blocks, channels)
    of_pairs = means.view(by_channel).mean(2).transpose(1, 2).contiguous()
    of_held = held.view(by_channel).mean(2).transpose(1, 2).contiguous()
    held, pair = held.T.clone(memory_format=torch.contiguous_format), pair.clone()  # the kernel writes into them
    source, block = (
        torch.empty(means.shape[:2], dtype=torch.int64, device=means.device),
        max(512, triton.next_power_of_2(units)),
    )
    _scan[1,](
        means.transpose(1, 2).contiguous(), of_pairs, held, of_held, pair, source, count, units, seen, int(known), threshold,
        low=low, high=high, halvings=(high - low).bit_length(), blocks=blocks, block=block, num_warps=max(1, min(16, block // 64)),
    )  # fmt: skip
    return source, held.T.contiguous(), pair
