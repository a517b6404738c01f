"""The operator of reuse: which frame pair was last encoded at the place of each unit, one frame pair after another.

One Triton kernel on CUDA, PyTorch elsewhere; off the CPU no value is read. vision/reuse.py says what it computes.
"""

import torch

from evoprune.backend.fallback import with_fallback

BLOCKS, CHANNELS = 2 * 4**2, 3  # blocks of a unit in both frames, of 7x7 or 8x8 pixels, and colours
# The greatest drift of brightness since the references were encoded, as a factor up or down.
BRIGHTNESS = 1.2

_LIBRARY = torch.library.Library("evoprune", "FRAGMENT")
_LIBRARY.define(
    "reuse_scan(Tensor means, Tensor held, Tensor pair, bool known, int seen, float threshold) -> (Tensor, Tensor, Tensor)"
)
reuse_scan = torch.ops.evoprune.reuse_scan


def _reuse_scan(
    means: torch.Tensor, held: torch.Tensor, pair: torch.Tensor, known: bool, seen: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 `[T, units]`, the frame pair whose row represents each unit; and `held` and `pair` after these frame pairs.

    Args:
        means: float32 `[T, units, 96]`, of the next frame pairs. held: float32 `[units, 96]`, of each place when it was last
            encoded, without meaning if not `known`. pair: int64 `[units]`, when that was. seen: frame pairs before.
        threshold: in levels of 255.
    """
    source = torch.empty(means.shape[:2], dtype=torch.int64, device=means.device)
    for t, now in enumerate(means):
        if not known:
            held, changed, known = now, torch.ones_like(pair, dtype=torch.bool), True
        else:
            gain = brightness(now, held)
            changed = differences(now, held * gain) >= threshold
            # Most of the picture has changed (a cut, or a moving camera), so the measured brightness means nothing.
            cut = 2 * changed.sum() > len(changed)
            if cut.device.type != "cpu" or cut:
                gain = torch.where(cut, 1.0, gain)
                changed = torch.where(cut, differences(now, held) >= threshold, changed)
            held = torch.where(changed[:, None], now / gain, held)
        pair = torch.where(changed, seen + t, pair)
        source[t] = pair
    return source, held.clone(), pair.clone()


def differences(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """float32 `[units]`: the greatest difference of a block (float32 `[units, 96]` both), Euclidean over the channels."""
    difference = (means - reference).view(len(means), BLOCKS, CHANNELS)
    return difference.square_().sum(2).amax(1).sqrt_()


def brightness(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """float32 `[96]`: how much brighter the picture is than its references: one factor per channel, repeated for every block.

    The median over units, weighted by brightness, ignores changes in less than half of the picture, and noise in dark regions.
    """
    now, then = (x.view(len(x), BLOCKS, CHANNELS).mean(1) for x in (means, reference))
    ratio, order = (now / then.clamp(min=1e-3)).sort(0)
    weight = then.gather(0, order).cumsum(0)
    middle = (weight < weight[-1] / 2).sum(0, keepdim=True)
    return ratio.gather(0, middle)[0].clamp(1 / BRIGHTNESS, BRIGHTNESS).repeat(BLOCKS)


@with_fallback("reuse", _reuse_scan)
def _reuse_scan_cuda(*args):
    from evoprune.backend import reuse_kernels

    return reuse_kernels.reuse_scan(*args, BLOCKS, CHANNELS, BRIGHTNESS)


_LIBRARY.impl("reuse_scan", _reuse_scan, "CompositeExplicitAutograd")
_LIBRARY.impl("reuse_scan", _reuse_scan_cuda, "CUDA")
