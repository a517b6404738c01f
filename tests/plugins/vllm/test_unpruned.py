"""vLLM with evoprune's encoder on a server that prunes nothing answers as with its own encoder."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
from PIL import Image

from evoprune.errors import UsageError
from evoprune.model import VisionConfig
from tests.plugins.vllm.serving import Asked, answers, outputs, pruning, same, samples
from tests.tiny import tiny_config

pytestmark = pytest.mark.vllm
HALVES = "What is in the picture? Describe it."


def requests(asked):
    """Return the questions, and some about two videos, images, and both."""
    clips = list(dict.fromkeys(id(each.media[0]) for each in asked))
    videos = [next(each.media[0] for each in asked if id(each.media[0]) == name) for name in clips]
    pictures = [Image.fromarray(video.frames[0]) for video in videos]
    mixed = [Asked((a, b), "Describe the videos.") for a, b in zip(videos[1:], videos, strict=False)]
    mixed += [Asked((a, b), "Describe it.") for a, b in zip(pictures, videos[1:], strict=False)]
    mixed += [Asked((a, *b), HALVES) for a, b in zip(videos, pairwise(pictures), strict=False)]
    mixed += [Asked(tuple(pictures[:2]), HALVES), Asked((videos[0],) * 2, "Describe it."), Asked((), "Who are you?")]
    return [each.request() for each in [*asked, *mixed]]


def test_it_answers_as_vllm_does(start):
    asked = samples(budget=1.0)
    stock = outputs(start(ours=False), requests(asked))
    assert same([output.outputs[0].text for output in stock[: len(asked)]], asked)
    ours = outputs(start(), requests(asked))
    assert [each.outputs[0].token_ids for each in ours] == [each.outputs[0].token_ids for each in stock]
    assert [each.prompt_token_ids for each in ours] == [each.prompt_token_ids for each in stock]


def test_a_budget_needs_a_server_that_prunes(start):
    asked = samples(names=("square.mp4",), budget=1.0)
    llm = start()
    with pytest.raises(ValueError, match="--video-pruning-rate"):
        answers(llm, [asked[0].request(0.5)])
    assert same(answers(llm, [asked[0].request(1.0)]), asked[:1])


@pytest.mark.parametrize(
    ("options", "says"),
    [  # test_pruning.py has the others
        (pruning(0.75, "cdpruner"), "reads the question"),
        ({"video_pruning_rate": 1.0}, "less than 1"),
        ({"video_pruning_rate": 0.5, "dtype": "float16"}, "float16"),
    ],
)
def test_a_server_that_cannot_work_does_not_start(start, options, says):
    with pytest.raises(Exception, match=says):  # vLLM replaces some errors by its own
        start(**options)


def test_a_pipeline_is_refused():
    """Its later stages would attend with unknown positions."""
    from evoprune_vllm.model import _check

    parallel = SimpleNamespace(pipeline_parallel_size=2)
    config = SimpleNamespace(
        model_config=SimpleNamespace(dtype="float32"), parallel_config=parallel, speculative_config=None
    )
    with pytest.raises(UsageError, match="pipeline"):
        _check(VisionConfig.of(tiny_config("qwen3_vl").vision_config), config)
