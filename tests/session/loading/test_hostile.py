"""Folders of models that are made to do harm, or by mistake: each is refused with the name of the file, and soon."""

import json
import os
import shutil
import time
from functools import partial
from pathlib import Path

import pytest

from evoprune.errors import ModelError, UsageError
from evoprune.language import template
from evoprune.language.prompt import build_prompt
from evoprune.session.loading.model import load_model as load
from evoprune.video_qa import VideoQA
from tests.loading import edit, error_of


@pytest.fixture(autouse=True)
def soon():
    """Each case ends within half a minute, also on a busy machine; most take less than a second (`--durations=0`)."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


TEXT, VISION = "text_config", "vision_config"
CONFIG = {
    # entry of config.json: value, and what the message says of it
    "num_hidden_layers of a billion": (TEXT, "num_hidden_layers", 10**9, "not a whole number from 1 to 1,000"),
    "more layers than weights": (TEXT, "num_hidden_layers", 900, "lack model.language_model.layers.899"),
    "deeper than the weights": (VISION, "depth", 900, "lack model.visual.blocks.899"),
    "other dimensions": (TEXT, "intermediate_size", 64, "cannot be loaded"),
    "huge matrices": (TEXT, "intermediate_size", 2**62, "intermediate_size is 4611686018427387904"),
}
VIDEO, IMAGE = "video_preprocessor_config.json", "preprocessor_config.json"
ENDS, WORDS = "generation_config.json", "tokenizer_config.json"
FILES = {
    # what is in it: its name, its entries or text, and what the message says of it
    "one mean": (IMAGE, {"image_mean": [1]}, "image_mean is [1], not a list of 3"),
    "no deviation": (VIDEO, {"image_std": [0, 0, 0]}, "image_std is [0, 0, 0]"),
    "size is a word": (VIDEO, {"size": "big"}, "size is 'big', not an object"),
    "edge is a word": (VIDEO, {"size": {"shortest_edge": "big"}}, "min_pixels is 'big'"),
    "no pixels": (VIDEO, {"max_pixels": -1}, "max_pixels is -1"),
    "no frames": (VIDEO, {"max_frames": -1}, "max_frames is -1"),
    "one frame": (VIDEO, {"max_frames": 1}, "max_frames is 1"),
    "half a frame": (VIDEO, {"min_frames": 1.5}, "min_frames is 1.5"),
    "fps is no number": (VIDEO, {"fps": float("nan")}, "NaN is no number of JSON"),
    "fps of nothing": (VIDEO, {"fps": -2}, "fps is -2"),
    "joint file": ("processor_config.json", '{"video_processor": 3}', "video_processor is 3, not an object"),
    "ends in words": (ENDS, {"eos_token_id": ["<|im_end|>"]}, "eos_token_id is ['<|im_end|>']"),
    "deep settings": (ENDS, '{"a":' * 5000, "nested deeper than"),
    "deep config": ("config.json", "[" * 10**5, "nested deeper than"),
    "deep tokenizer settings": (WORDS, "[" * 10**5, "nested deeper than"),
    "template is a number": ("chat_template.json", '{"chat_template": 3}', "chat_template is 3, not a text"),
    "bytes that are no text": ("config.json", b"\xff\xfe\0", "utf-8"),
}
WEIGHTS = {
    # weight_map of the index: what the message says of it
    "a list": ([1], "weight_map is [1], not an object"),
    "numbers": ({"a": 1}, "weight_map.a is 1, not the name of a file"),
    "another folder": ({"a": "../other/model.safetensors"}, "weight_map.a is '../other/model.safetensors'"),
    "somewhere else": ({"a": "/etc/passwd"}, "weight_map.a is '/etc/passwd'"),
    "Windows": ({"a": "C:x"}, "weight_map.a is 'C:x'"),
    "itself": ({"a": "."}, "is missing"),
    "a pipe": ({"a": "pipe"}, "pipe is missing"),
}


def said_of(folder: Path, file: str, says: str) -> None:
    message = error_of(folder)
    assert says in message
    assert file in message or str(folder) in message


@pytest.mark.parametrize(("part", "name", "value", "says"), CONFIG.values(), ids=CONFIG)
def test_numbers_of_a_config(folder, part, name, value, says):
    content = json.loads((folder / "config.json").read_text())
    content[part][name] = value
    (folder / "config.json").write_text(json.dumps(content))
    said_of(folder, "config.json", says)


@pytest.mark.few(9)
@pytest.mark.parametrize(("name", "content", "says"), FILES.values(), ids=FILES)
def test_settings(folder, name, content, says):
    if name == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
    if isinstance(content, dict):
        edit(folder / name, **content)
    else:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    said_of(folder, name, says)


@pytest.mark.parametrize(("weight_map", "says"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_files_of_the_folder(folder, weight_map, says):
    os.mkfifo(folder / "pipe")
    shutil.copytree(folder, folder.parent / "other", ignore=lambda *_: ["pipe"])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    said_of(folder, "model.safetensors.index.json", says)


@pytest.mark.few(8)
@pytest.mark.parametrize("name", ["config.json", VIDEO, ENDS, WORDS, "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "circle", "100 GB"])
def test_what_is_no_file_or_too_large_a_one(folder, name, kind):
    if kind == "100 GB":
        os.truncate(folder / name, 10**11)
    else:
        (folder / name).unlink()
        os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(name)
    said_of(folder, name, "MiB" if kind == "100 GB" else "")


def test_more_tokens_than_embeddings(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["?"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="makes token 1000000, and the model knows 4"):
        VideoQA.load(str(folder)).encode("samples/square.mp4").ask("What?", max_new_tokens=1).text  # noqa: B018


BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}


def test_steps_of_a_tokenizer_that_multiply(folder):
    whole = (folder / "tokenizer.json").read_text()
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [BOMB] * 9})
    assert "normalizer is of kind" in error_of(folder)
    (folder / "tokenizer.json").write_text(whole)
    edit(folder / "tokenizer.json", decoder=BOMB)
    assert "decoder is of kind Replace, not ByteLevel" in error_of(folder)


def test_a_pattern_that_takes_too_many_steps(folder, capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+c"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load(str(folder), pack=False).tokenizer
    with pytest.raises(ModelError, match=r"broke down: .*limit"):
        build_prompt(tokenizer, "a" * 99, [("video", 1)])


def test_a_device_that_computes_nothing(folder):
    with pytest.raises(UsageError, match="meta"):
        VideoQA.load(str(folder), device="meta")


# --- chat templates ---

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
TEMPLATES = {
    "10 GB": ("{{ 'x' * 10**10 }}", "too much memory"),
    "10 GB by a filter": ("{{ 'x' | center(10**10) }}", "too much memory"),
    "long": ("{{ 'x' * 2000000 }}", "it makes 2,000,000 characters"),
    "deep": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
}


def refusal(folder: Path, source: str) -> str:
    (folder / "chat_template.jinja").write_text(source)
    tokenizer = load(str(folder), pack=False).tokenizer
    with pytest.raises(ModelError) as caught:
        build_prompt(tokenizer, "What?", [("video", 1)])
    assert str(folder / "chat_template.jinja") in caught.value.message
    return caught.value.message


@pytest.mark.few(2)
@pytest.mark.parametrize(("source", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_take_too_much(folder, source, says):
    assert says in refusal(folder, source)


@pytest.mark.full
@pytest.mark.parametrize("source", [LOOPS, "{{ 3 ** (3 ** 30) }}"], ids=["loops", "a power, which sees no signal"])
def test_templates_without_an_end(folder, source, monkeypatch):
    monkeypatch.setattr(template, "CPU_SECONDS", 1)
    assert "come to an end" in refusal(folder, source)


def test_a_template_is_rendered_once(folder, monkeypatch):
    tokenizer = load(str(folder), pack=False).tokenizer
    build_prompt(tokenizer, "What?", [("video", 1)])
    monkeypatch.setattr(template, "_apart", partial(pytest.fail, "a second process"))
    build_prompt(tokenizer, "Why?", [("video", 1)])
