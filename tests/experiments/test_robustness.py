"""Noise: the light changes all pixels alike, the table agrees with the samples, and the command runs."""

from pathlib import Path

import numpy as np

from evoprune.video.frames import read_frames
from evoprune.video.probe import probe
from experiments import robustness
from experiments.robustness import NOISES, Noise, in_changing_light, table
from tests.threads import one_thread  # noqa: F401

CLIP = Path("samples/square.mp4")


def test_light_rises_and_falls_for_all_pixels_alike():
    info, how = probe(CLIP), {"decoder": "pyav", "chunk_bytes": 2**20}
    times = (0.0, 1.0, 2.0, 3.0)  # a quarter of a wave each
    plain, lit = (
        np.concatenate([c.frames for c in read(info, times, **how)]).astype(int)
        for read in (read_frames, in_changing_light(4))
    )
    assert np.array_equal(np.concatenate([c.frames for c in in_changing_light(0)(info, times, **how)]), plain)
    for frame, offset in enumerate((0, 4, 0, -4)):
        assert np.array_equal(lit[frame], (plain[frame] + offset).clip(0, 255)), frame


def test_the_table():
    def samples(right, live):
        return [
            {"video": f"v{i // 2}", "id": f"{i}", "right": i < right, "live": live, "encoded": live / 2}
            for i in range(8)
        ]

    coarse, dim = Noise(33), Noise(18, 2)
    made = {
        (n, m): samples(r, live)
        for n, m, r, live in [(coarse, "none", 8, 1), (coarse, "x", 4, 0.5), (dim, "none", 6, 1), (dim, "x", 6, 0.25)]
    }
    lines = table(made, "x").splitlines()
    assert lines[2].startswith("| crf 33 | 100.0 | 50.0 | -50.0 (") and lines[2].endswith("| 0.25 | 0.50 |")
    assert (
        lines[3] == "| crf 18, light +-2 levels | 75.0 | 75.0 | +0.0 (too few videos for an interval) | 0.12 | 0.25 |"
    )


def test_the_command_runs_on_clips_with_a_still_camera(saved, capsys, monkeypatch):
    monkeypatch.setattr(robustness, "NOISES", (NOISES[0], NOISES[-1]))
    robustness.main(["--model", str(saved), "--limit", "1", "-b", "0.5"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "1 clips with a still camera, split 'validation', block 0, 6 questions; evoprune -b 0.5"
    assert [line.split(" | ")[0] for line in lines[4:]] == ["| crf 10", "| crf 18, light +-8 levels"]
