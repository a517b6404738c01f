"""The notes before the first frame is read: how long it will take, and which limits apply."""

import sys

import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video import frames
from evoprune.video.plan import MAX_VISUAL_TOKENS_CPU
from tests.video.files import write_video

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """150 s of 224x224, two frames a second."""
    pictures = np.random.default_rng(0).integers(0, 255, (4, 224, 224, 3), np.uint8)
    frames = (pictures[i % 4] for i in range(300))
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", frames, fps=2, options={"preset": "ultrafast"})


@pytest.fixture
def notes(cli, tiny_folder, monkeypatch):
    """`notes(clip, flags...)`: the lines on stderr before the first frame is read, by default from a model that is not the demo.

    With `whole` the command runs to its end, and no note may be printed twice; else it stops there.
    """

    def call(clip, *flags: str, model=tiny_folder, whole: bool = False) -> list[str]:
        def announced(*what):
            print("READING", file=sys.stderr)
            if whole:
                return read(*what)
            raise VideoError("enough", "for this test")

        with monkeypatch.context() as patch:
            read = frames.stream_frames
            patch.setattr(frames, "stream_frames", announced)
            result = cli("ask", clip, QUESTION, "-m", model, "-n", "1", *flags)
        assert result.code == (0 if whole else 3), result.err
        before, after = result.err.split("READING\n")
        assert not any(word in after for word in ("estimated", "asked for", "at most"))
        assert all(len(line) <= 80 for line in before.splitlines())
        return before.splitlines()

    return call


@pytest.mark.few(1)
@pytest.mark.parametrize(("rate", "says"), [(1e6, " min"), (2e7, " s"), (1e15, None)])
def test_a_long_wait_is_estimated_before_it_begins(notes, monkeypatch, rate, says):
    monkeypatch.setattr("evoprune.model.cost.matmul_rate", lambda *_: rate)
    lines = notes(CLIP, whole=True)
    if says is None:
        assert lines == []
    else:
        assert len(lines) == 1 and lines[0].startswith("estimated first token ~") and lines[0].endswith(says)


def test_no_estimate_with_quiet_or_for_the_demo(notes, monkeypatch):
    monkeypatch.setattr("evoprune.model.cost.matmul_rate", lambda *_: 1e6)
    assert notes(CLIP, "-q") == []
    assert notes(CLIP, model="demo") == []  # nobody has to wait for that


@pytest.mark.full
def test_the_token_limit_of_a_cpu_is_noted(notes, long_clip):
    flags = ("--max-frames", "300", "-b", "fast")
    assert MAX_VISUAL_TOKENS_CPU == 4096
    (line,) = notes(long_clip, *flags)
    assert line == "at most 4,096 tokens on a CPU (--max-visual-tokens): 300 frames of 140x140"
    assert notes(long_clip, *flags, "-q") == []


def test_a_token_limit_that_was_set_is_noted(notes):
    assert notes(CLIP, "--max-visual-tokens", "50", model="demo") == [
        "at most 50 tokens (--max-visual-tokens): 8 frames of 112x84"
    ]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        ((), "the model's 300"),
        (("--fps", "0.2"), None),
        (("--fps", "2"), "the 300 asked for"),
        (("--fps", "1", "--end", "1:00"), "the 60 asked for"),
        (("--fps", "2", "--max-frames", "16"), None),  # whoever sets the limit knows
        (("--frames", "32"), None),
        (("--frames", "33"), "the 34 asked for"),
        (("--frames", "4000"), "the 4,000 asked for"),
    ],
)
def test_the_frame_limit_of_the_model_is_noted(notes, long_clip, flags, asked):
    every = "~2 s" if "--end" in flags else "~5 s"
    says = [f"reading 32 frames, one every {every}, not {asked} (--max-frames)"] if asked else []
    assert notes(long_clip, "-b", "fast", *flags) == says


def test_both_limits(notes, long_clip):
    lines = notes(long_clip, "--frames", "64", "--max-visual-tokens", "100")
    assert [line.split("(")[1].split(")")[0] for line in lines] == [
        "--max-frames",
        "--max-visual-tokens",
    ]
