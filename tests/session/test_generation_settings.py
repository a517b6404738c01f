"""What a model's generation_config.json says is done as transformers does it, or said."""

import json
import warnings
from contextlib import nullcontext

import pytest
import torch

from evoprune.bench.verify.subject import QUESTION, SAMPLING, Subject
from evoprune.errors import ModelWarning
from evoprune.video_qa import VideoQA
from tests.loading import edit, error_of, load_model

CLIP = "samples/square.mp4"


@pytest.mark.parametrize("penalty", [None, 1.0, 1.5])
def test_the_models_own_repetition_penalty_is_applied_as_in_transformers(folder, penalty):
    edit(folder / "generation_config.json", repetition_penalty=1.3)
    loaded = load_model(str(folder), dtype="fp32")
    encoded = VideoQA(loaded, budget=1.0, method="none").encode(CLIP, **vars(SAMPLING))
    answer = encoded.ask(QUESTION, max_new_tokens=24, repetition_penalty=penalty)
    assert answer.text and answer.report.generation["repetition_penalty"] == (penalty or 1.3)
    subject = Subject(loaded, CLIP, CLIP, CLIP)
    asked = subject.about(CLIP)
    length = len(asked.prompt.input_ids)
    places = torch.cat([torch.arange(length)[None], asked.positions])[:, None]
    how = {} if penalty is None else {"repetition_penalty": penalty}
    ids = subject.transformers.generate(**asked.call, position_ids=places, do_sample=False, max_new_tokens=24, **how)
    made = [i for i in ids[0, length:].tolist() if i not in loaded.eos_ids]
    assert answer.ids == made and len(made) > 3


@pytest.mark.parametrize(
    "asked, said",
    [
        ({}, None),
        ({"num_beams": 1, "do_sample": None, "top_k": None, "max_new_tokens": 8, "repetition_penalty": None}, None),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, "no_repeat_ngram_size and num_beams"),
        ({"suppress_tokens": [1, 2], "min_p": 0.1}, "min_p and suppress_tokens"),
    ],
)
def test_settings_that_are_not_done_are_said_once(folder, asked, said):
    edit(folder / "generation_config.json", **asked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(str(folder))
    expected = [] if said is None else [f"evoprune does not do what {folder}/generation_config.json asks for: {said}"]
    assert [str(each.message) for each in caught if each.category is ModelWarning] == expected


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("repetition_penalty", 0), ("temperature", -1), ("top_p", 2), ("top_k", "many"), ("do_sample", "yes")],
)
def test_settings_out_of_range_are_refused(folder, name, wrong):
    edit(folder / "generation_config.json", **{name: wrong})
    assert f"generation_config.json is damaged: {name} is " in error_of(folder)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_an_answer_must_be_able_to_end(folder, where):
    never = 1_000_000_000
    if where == "config.json":
        (folder / "generation_config.json").unlink()
        content = json.loads((folder / where).read_text())
        content["text_config"]["eos_token_id"] = never
        (folder / where).write_text(json.dumps(content))
    else:
        edit(folder / where, eos_token_id=[never])
    said = f"{folder}/{where}: eos_token_id {never} is no token of the model, so no answer could end"
    assert said in error_of(folder)


@pytest.mark.parametrize(
    ("ends", "expected"), [(7, (7,)), ([7, 8], (7, 8)), ([7, 5000], (7,)), ([], (400,)), (None, (400,))]
)
def test_end_tokens(folder, ends, expected):
    """Those that are no tokens are said where there are others."""
    edit(folder / "generation_config.json", eos_token_id=ends)
    wrong = pytest.warns(ModelWarning, match="eos_token_id 5000 is no token of the model")
    with wrong if ends == [7, 5000] else nullcontext():
        assert load_model(str(folder)).eos_ids == expected
