"""Model folders with extreme or nonsensical settings are refused in two lines, or work as if the setting were not there."""

import copy
import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError
from evoprune.language import Tokenizer
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import read_generation
from evoprune.session.loading.weights import weights_of
from evoprune.session.options import ModelOptions
from evoprune.video import SamplingOptions, probe

DEMO = DEMOS["demo"].folder
CLIP = "samples/square.mp4"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
PICTURES, VIDEOS, ADAPTER = "preprocessor_config.json", "video_preprocessor_config.json", "adapter_config.json"
TEXT, VISION = "text_config", "vision_config"
NAN = float("nan")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": r"\s+"}, "behavior": "Isolated", "invert": False}
ALL = {"Sequence": {"id": "A", "type_id": 0}}
TEMPLATE = {"type": "TemplateProcessing", "single": [ALL], "pair": [ALL, ALL], "special_tokens": {}}
ADDED = {"id": 5000, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def sequence(kind, parts):
    return {"type": "Sequence", kind: parts}


def nested(levels):
    part = BYTES
    for _ in range(levels):
        part = sequence("pretokenizers", [part])
    return part


# Each has a file, the path to the setting, and the value. All of them are refused.
REFUSED = [
    *((CONFIG, (TEXT, name), value) for name in ("hidden_size", "num_hidden_layers") for value in (0, -1, 2**63, NAN, "8", True)),
    *((CONFIG, (TEXT, name), 0) for name in ("vocab_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")),
    *((CONFIG, (TEXT, "rms_norm_eps"), value) for value in (0, -1e-6, 1e300, NAN, "1e-6")),
    *((CONFIG, (TEXT, "rope_parameters", "mrope_section"), value) for value in ([6, 5], [-1, 9, 8], [2**40] * 3, [16] * 10**5, {})),
    *((CONFIG, (TEXT, "rope_parameters", "rope_theta"), value) for value in (0, -1, NAN, "100", 1e300)),
    *((CONFIG, (VISION, name), value) for name in ("depth", "num_heads", "patch_size") for value in (0, -2, 2**31, "2", True)),
    *((CONFIG, (VISION, "fullatt_block_indexes"), value) for value in ([8], [-1], [1] * 10**5, 3, ["1"])),
    *((CONFIG, (VISION, "window_size"), value) for value in (0, -112, 111, 1e300)),
    *((CONFIG, (VISION, "tokens_per_second"), value) for value in (0, -1, NAN, "2", 1e300)),
    *((CONFIG, (name,), value) for name in (TEXT, VISION) for value in ([], "x", 5)),
    *((CONFIG, ("quantization_config",), value) for value in ("awq", {"bits": 4}, {"quant_method": 7})),
    *((VIDEOS, ("fps",), value) for value in (-1, NAN, 1e300, "2", [2])),
    *((VIDEOS, ("min_frames",), value) for value in (-1, 2**40, 0.5, "4")),
    *((VIDEOS, ("max_frames",), value) for value in (1, -5, 2**40, True)),
    *((VIDEOS, ("size",), value) for value in (5, {"shortest_edge": -1}, {"longest_edge": 1e300}, {"longest_edge": "x"})),
    *((PICTURES, (name,), value) for name in ("image_mean", "image_std") for value in ([1], [1] * 4, "x", [NAN] * 3, [1e300] * 3)),
    *((PICTURES, ("image_std",), value) for value in ([0, 0, 0], [-1, 1, 1])),
    *((PICTURES, (name,), value) for name in ("min_pixels", "max_pixels") for value in (-1, 2**63, 0.5, "1")),
    *((GENERATION, ("eos_token_id",), value) for value in ("x", -1, [*range(100)], {}, [None], 1.5)),
    *((TOKENIZER, ("post_processor",), value) for value in (
        TEMPLATE | {"single": [ALL] * 20_000},
        TEMPLATE | {"single": [ALL] * 8},
        TEMPLATE | {"single": []},
        sequence("processors", [TEMPLATE | {"single": [ALL] * 2}] * 8),
        sequence("processors", [BYTES] * 1000),
        {"type": "RobertaProcessing", "sep": ["a", 1], "cls": ["b", 2], "trim_offsets": True, "add_prefix_space": False},
    )),
    *((TOKENIZER, ("pre_tokenizer",), value) for value in (
        nested(3),
        nested(200),
        sequence("pretokenizers", [SPLIT] * 500 + [BYTES]),
        SPLIT | {"pattern": {"Regex": "(?:a|b)" * 5000}},
        {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True},
        {"type": "FixedLength", "length": 1},
    )),
    *((TOKENIZER, ("normalizer",), value) for value in (
        {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 10**6},
        {"type": "Prepend", "prepend": "x" * 10**6},
        sequence("normalizers", [{"type": "NFC"}] * 1000),
        5,
    )),
    *((TOKENIZER, ("decoder",), value) for value in (
        {"type": "Replace", "pattern": {"String": "a"}, "content": "x" * 10**6},
        sequence("decoders", [BYTES] * 1000),
        None,
    )),
    *((TOKENIZER, ("model", name), "x" * 10**6) for name in ("continuing_subword_prefix", "end_of_word_suffix")),
    (TOKENIZER, ("model", "dropout"), 0.5),
    (TOKENIZER, ("model", "type"), "Unigram"),
    (TOKENIZER, ("model", "vocab"), {"a": -1}),
    (TOKENIZER, ("model", "vocab"), []),
    (TOKENIZER, ("added_tokens",), [ADDED | {"content": "ab" * 10**6}]),
    (TOKENIZER, ("added_tokens",), [ADDED | {"content": ""}]),
    (TOKENIZER, ("added_tokens",), [ADDED | {"content": f"{i:4000}"} for i in range(300)]),
    (TOKENIZER, ("added_tokens",), 5),
]  # fmt: skip
# Settings without an effect on evoprune.
HARMLESS = [
    *((CONFIG, (TEXT, "initializer_range"), value) for value in (0, -1, 1e300)),
    *((VIDEOS, (name,), value) for name in ("patch_size", "merge_size", "temporal_patch_size") for value in (0, -1, "x")),
    *((VIDEOS, ("size",), value) for value in ({}, {"longest_edge": 1}, {"shortest_edge": 10**6, "longest_edge": 5})),
    *((PICTURES, (name,), value) for name in ("rescale_factor", "resample") for value in (0, -1, 1e300, "x")),
    *((ADAPTER, (name,), value) for name in ("r", "target_modules", "peft_type") for value in (-1, 10**30, NAN, [1] * 10**4, {})),
    (GENERATION, ("bad_words_ids",), [[1]] * 10**4),
    (GENERATION, ("suppress_tokens",), [1] * 10**5),
    (GENERATION, ("eos_token_id",), [2] * 10**5),
    (TOKENIZER, ("truncation",), {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}),
    (TOKENIZER, ("post_processor",), None),
    (TOKENIZER, ("post_processor",), BYTES),
]  # fmt: skip


@cache
def contents(name):
    path = DEMO / name
    return json.loads(path.read_text()) if path.is_file() else {}


def damage(folder: Path, name, place, value):
    """Write a file of the demo model to `folder`, with one setting changed."""
    content = copy.deepcopy(contents(name))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / name).write_text(json.dumps(content))


def restore(folder: Path, name):
    if (DEMO / name).is_file():
        shutil.copy(DEMO / name, folder)
    else:
        (folder / name).unlink()


def read(folder: Path) -> None:
    """Read everything that is read before a model's weights, and plan an input."""
    description = describe(ModelOptions(str(folder), device="cpu", dtype="fp32"))
    description.plan(probe(CLIP), SamplingOptions())
    Tokenizer.load(folder).encode("What colour is the square?")
    read_generation(folder)
    weights = weights_of(description)
    assert weights.files and weights.bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("models") / "demo"))


def named(case):
    name, place, value = case
    return f"{name} {'.'.join(place)} {str(value)[:24]}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_damaged_settings_are_refused_before_weights_are_read(folder, case):
    damage(folder, *case)
    try:
        with pytest.raises(EvopruneError) as caught:
            read(folder)
    finally:
        restore(folder, case[0])
    assert caught.value.exit_code == 4
    assert len(str(caught.value).splitlines()) == 2 and len(str(caught.value)) < 500


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HARMLESS, ids=named)
def test_harmless_settings_are_ignored(folder, case):
    damage(folder, *case)
    try:
        read(folder)
    finally:
        restore(folder, case[0])


def answer_all(folder: Path) -> None:
    """Ask a question to a copy of the demo model with each of the settings in turn, and print the peak memory in MiB."""
    import resource
    import time

    from evoprune.video_qa import VideoQA

    shutil.copytree(DEMO, folder)
    for case in [*HARMLESS, *REFUSED]:
        start = time.process_time()
        damage(folder, *case)
        try:
            VideoQA.load(str(folder), device="cpu").encode(CLIP, frames=2).ask("What?", max_new_tokens=2).text  # noqa: B018
            assert case in HARMLESS, named(case)
        except EvopruneError as problem:
            assert case in REFUSED and problem.exit_code == 4, named(case)
        restore(folder, case[0])
        assert time.process_time() - start < 10, named(case)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


@pytest.mark.full
def test_damaged_folders_take_little_memory_and_time(tmp_path):
    program = (
        f"from pathlib import Path; from {__name__} import answer_all; answer_all(Path({str(tmp_path / 'demo')!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 1024
