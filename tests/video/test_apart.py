"""Good files of all kinds give the same facts and the same frames, read in a process apart or in this one."""

from dataclasses import replace

import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames, scan
from evoprune.video.sandbox import isolation
from experiments.decoders import in_this_process
from tests.decoders import DECODERS
from tests.video.files import numbered_frames, pixels, write_image
from tests.video.good import good_files
from tests.video.kinds import write_kind

pytestmark = pytest.mark.skipif(not isolation.POSSIBLE, reason="needs Linux")


def everything(path, decoder, chunk_frames):
    """Metadata, the result of a scan, the frames at some times and their own times; or the error."""
    info = probe(path)
    end = info.duration_s
    times = sorted([0.0, *np.linspace(0, end, 12), *np.random.default_rng(0).uniform(0, end, 5), end + 1])
    chunk_bytes = chunk_frames * info.width * info.height * 3
    try:
        chunks = list(read_frames(info, times, decoder=decoder, chunk_bytes=chunk_bytes))
    except VideoError as problem:
        return info, None, (problem.message, problem.hint), None
    displayed = [(chunk.first, chunk.times_s, chunk.damaged) for chunk in chunks]
    return info, replace(scan(path), seconds=0.0), displayed, pixels(chunks)


def check(path, chunk_frames):
    for decoder in DECODERS:
        apart = everything(path, decoder, chunk_frames)
        with in_this_process():
            here = everything(path, decoder, chunk_frames)
        assert apart[:3] == here[:3], path
        assert np.array_equal(apart[3], here[3]), path
        assert decoder == "decord" or apart[3] is not None


@pytest.mark.parametrize("name", ["h264.mp4", "vary.webm", "turned.mp4", "late.ts", "odd.mp4"])
def test_a_few(name, folder):
    check(write_kind(folder, name), 4)


def test_a_folder(tmp_path):
    for i, rgb in enumerate(numbered_frames(9)):
        write_image(tmp_path / f"{i}.{('png', 'jpg', 'webp', 'bmp')[i % 4]}", rgb)
    check(tmp_path, 4)


@pytest.mark.slow
def test_two_hundred_files(tmp_path):
    files = good_files(tmp_path)
    assert len(files) == 200
    for i, path in enumerate(files):
        check(path, 2 + i % 9)
