"""Qwen4-VL: a tower as that of Qwen3-VL, with five levels of DeepStack."""

import pytest

from evoprune.model.config import FAMILIES, QWEN4, parse_config
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.tiny import save_tiny, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen4"), family=QWEN4)


def test_a_file_need_not_say_the_levels():
    content = tiny_config(QWEN4).to_dict()
    del content["vision_config"]["deepstack_visual_indexes"]
    vision = content["vision_config"] | {"depth": 27}
    config = parse_config(content | {"vision_config": vision})
    assert config.vision_config.deepstack_visual_indexes == FAMILIES[QWEN4].vision["deepstack_visual_indexes"]
    assert config.vision_config.layers_read == 6 and config.text_config.head_norms


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_random_model_encodes_and_answers(folder, load_format):
    loaded = load_model(str(folder), dtype="fp32", load_format=load_format)
    session = VideoQA(loaded, budget=0.25)
    video = session.encode("samples/square.mp4", frames=4)
    assert video.encoded.deepstack.shape == (5, *video.encoded.features.shape)
    answer = video.ask("What happens?", max_new_tokens=3)
    assert answer.text is not None and len(answer.ids) <= 3
    assert type(loaded.model).__module__.startswith("evoprune.")
