"""Every number given for an option of generation is either computed with or refused in two lines."""

import math

import pytest

from evoprune.errors import DoesNotFit, UsageError
from evoprune.language import GenerationOptions
from evoprune.video_qa import VideoQA

NUMBERS = [
    *(0, -0.0, -1, 5e-324, 1e-300, 1e-46, 1e-38, 1e-3, 0.5, 1, 2, 1e3, 1e6, 1e38, 1e39, 1e300, math.nan, math.inf, -math.inf),
    *(True, 2**31, 2**63, 2**64, 10**400, 10**5000),
]  # fmt: skip
NAMES = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "logprobs", "seed")
SCHEMA = {"type": "integer", "minimum": 0, "maximum": 99}
WAYS = [{}, {"temperature": 1.0}, {"choices": ["red", "green"]}, {"schema": SCHEMA, "temperature": 1.0}]
FEW = (5e-324, 1e-3, 1e3, 1e6, 2**31, 2**63)  # for the later ways, which take longer


@pytest.fixture(scope="module")
def video():
    return VideoQA.load("demo", device="cpu").encode("samples/square.mp4", frames=2)


@pytest.mark.parametrize("name", NAMES)
def test_extreme_numbers(video, name):
    answered = 0
    for place, given in enumerate(WAYS):
        for number in () if name in given else NUMBERS if place < 2 else FEW:
            try:
                assert video.ask("What?", **{"max_new_tokens": 1} | given | {name: number}).text is not None
                answered += 1
            except (UsageError, DoesNotFit) as problem:
                assert len(str(problem).splitlines()) == 2 and len(str(problem)) < 400
    assert answered > 2


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("temperature", 0, 1e6), ("top_p", 5e-324, 1), ("top_k", 0, 2**31), ("repetition_penalty", 1e-3, 1e3)],
)
def test_limits_are_those_of_model_files(name, low, high):
    for number in (low, high):
        assert getattr(GenerationOptions(**{name: number}), name) == number
    for number in (low - 1, high + 1):
        with pytest.raises(UsageError, match=f"{name} is .*, not a"):
            GenerationOptions(**{name: number})
