"""Every Nth frame of a video: by the command and in Python."""

from dataclasses import replace

import pytest

from evoprune.errors import UsageError
from evoprune.session.loading.model import load_model
from evoprune.session.options import SamplingOptions
from evoprune.video.frames import probe
from evoprune.video.plan import InputLimits, make_plan
from evoprune.video_qa import VideoQA

CLIP = "samples/square.mp4"


def test_the_rate_is_that_of_the_video_by_n():
    info = probe(CLIP)
    plan = make_plan(info, InputLimits(), every_nth=4)
    assert plan.sampling == make_plan(info, InputLimits(), fps=info.fps / 4).sampling
    assert plan.sampling != make_plan(info, InputLimits()).sampling
    video = VideoQA(load_model("demo"), budget=0.25).encode(CLIP, every_nth=4)
    assert tuple(video.plan.sampling.times_s) == plan.sampling.times_s


@pytest.mark.parametrize("unknown", [{"fps": None}, {"rate_guessed": True}])
def test_an_unknown_rate_is_refused(unknown):
    with pytest.raises(UsageError, match=r"frame rate of .* is unknown") as caught:
        make_plan(replace(probe(CLIP), **unknown), InputLimits(), every_nth=4)
    assert caught.value.hint == "give fps or frames"


@pytest.mark.parametrize("other", [{"fps": 2.0}, {"frames": 8}, {"every_nth": 0}])
def test_it_is_refused_with_others_and_below_one(other):
    with pytest.raises(UsageError, match="every_nth"):
        SamplingOptions(**{"every_nth": 4} | other)
