"""Synthetic clips never change a byte, so that their measurements stay comparable."""

import hashlib

import pytest

from evoprune.bench.clips import synthetic_clip

DIGESTS = {
    ("motion", 8, 224, 336): "aab44def4a7d48ab",
    ("motion", 6, 112, 140): "070a99c338cfafe8",
    ("motion", 16, 336, 224): "a0f4f8587dec56fa",
    ("motion", 4, 28, 140): "44b80675ecdf5929",
    ("static90", 8, 224, 336): "7e0f4cafe3924cfc",
    ("static90", 6, 112, 140): "87d7fdbc9edc78d4",
    ("static90", 16, 336, 224): "b2db865fe729ee77",
    ("static90", 4, 28, 140): "296a5ec0da0d4992",
    ("noise", 8, 224, 336): "a51d0a84455ad9f1",
    ("noise", 6, 112, 140): "bbb4b707f2d1ee27",
    ("noise", 16, 336, 224): "7556d1f2bdbbc465",
    ("noise", 4, 28, 140): "7bb33f3247c25f06",
}


@pytest.mark.parametrize(("kind", "frames", "height", "width"), DIGESTS, ids=str)
def test_the_bytes_never_change(kind, frames, height, width):
    made = hashlib.sha256(synthetic_clip(kind, frames, height, width).tobytes()).hexdigest()
    assert made[:16] == DIGESTS[kind, frames, height, width]


@pytest.mark.parametrize(
    "wrong", [("film", 2, 28, 28), ("noise", 3, 28, 28), ("noise", 2, 30, 28), ("noise", 0, 28, 28)]
)
def test_only_whole_grids_of_whole_units(wrong):
    with pytest.raises(ValueError, match=r"synthetic|whole"):
        synthetic_clip(*wrong)
