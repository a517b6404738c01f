"""Memory follows the frames that are looked at, not the length of the video."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.video.files import write_video

ROOT = Path(__file__).parents[2]


def peak(path: Path) -> int:
    command = [sys.executable, "-m", "evoprune_cli", "ask", str(path), "What happens?", "--frames", "24", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    record = json.loads(done.stdout)
    assert record["sampling"]["frames"] == 24
    return record["memory"]["peak_bytes"]


@pytest.mark.slow
def test_peak_is_flat_from_a_minute_to_two_hours(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)

    def frames(seconds: int):
        for i in range(seconds * 10):
            yield np.roll(picture, i % 160, axis=1)

    peaks = {}
    for seconds in (60, 7200):
        path = tmp_path / f"{seconds}.mp4"
        write_video(path, frames(seconds), fps=10)
        peaks[seconds] = peak(path)
    assert peaks[7200] <= 1.1 * peaks[60], peaks
