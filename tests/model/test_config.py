"""Configs are read as transformers reads them, and invalid ones are rejected."""

import copy
import json
from dataclasses import replace

import pytest

from evoprune.bundled import DEMOS
from evoprune.model.config import (
    FAMILIES,
    FULL,
    LINEAR,
    QWEN3_5,
    QWEN3_5_MOE,
    QWEN3_MOE,
    QWEN4,
    Config,
    Unsupported,
    VisionConfig,
)
from evoprune.model.qwen4 import INDEXED
from evoprune.session import BUNDLED_CONFIGS
from evoprune.session.loading.hosted import hugging_face_config
from tests.tiny import tiny_config

NEW = json.loads(BUNDLED_CONFIGS["Qwen/Qwen2.5-VL-3B-Instruct"].read_text())


def flat(content):
    """Return the same config in the form of older checkpoints on the hub, which is flat and uses older names."""
    text, vision = dict(content["text_config"]), dict(content["vision_config"])
    rope = text.pop("rope_parameters")
    vision["in_chans"] = vision.pop("in_channels")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text |= {"model_type": "qwen2_5_vl", "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
    return {k: v for k, v in content.items() if k != "text_config"} | text | {"vision_config": vision}


QWEN2_VL_2B = {  # as on the hub, without fields that do not matter here
    "model_type": "qwen2_vl", "hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
    "vision_config": {
        "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 1536,
        "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
    },
}  # fmt: skip


def test_qwen2_vl_under_the_same_names():
    vision = Config.parse(QWEN2_VL_2B).vision_config
    assert (vision.hidden_size, vision.intermediate_size, vision.out_hidden_size) == (1280, 5120, 1536)
    assert vision.fullatt_block_indexes == tuple(range(32)) and vision.tokens_per_second is None
    back = hugging_face_config(Config.parse(QWEN2_VL_2B))
    assert back.model_type == "qwen2_vl" and back.vision_config.embed_dim == 1280
    assert Config.parse(back.to_dict()).vision_config == vision


def test_both_ways_to_write_it_mean_the_same():
    new, old = Config.parse(NEW), Config.parse(flat(NEW))
    assert old.vision_config == new.vision_config
    assert old.tie_word_embeddings is new.tie_word_embeddings is True
    assert old.text_config.rope_parameters["rope_theta"] == new.text_config.rope_parameters["rope_theta"]
    assert old.text_config.rope_parameters["mrope_section"] == [16, 24, 24]
    for name in ("hidden_size", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(old.text_config, name) == getattr(new.text_config, name)


@pytest.mark.parametrize(
    ("name", "same"),
    [("Qwen3.6-27B", "27B"), ("Qwen3.8-27B", "27B"), ("Qwen3.6-35B-A3B", "35B-A3B")],
)
def test_later_versions_have_the_architecture_of_qwen3_5(name, same):
    """Their config files have additional entries, and use the whole model's type as the tower's type."""
    content = json.loads(BUNDLED_CONFIGS[f"Qwen/{name}"].read_text())
    content["vision_config"] |= {"model_type": content["model_type"], "deepstack_visual_indexes": []}
    more = {
        "mamba_ssm_dtype": "float32",
        "mtp_num_hidden_layers": 1,
        "partial_rotary_factor": 0.25,
        "pad_token_id": None,
    }
    periods = content["text_config"]["num_hidden_layers"] // 4
    content["text_config"] |= more | {"layer_types": [LINEAR, LINEAR, LINEAR, FULL] * periods}
    expected = json.loads(BUNDLED_CONFIGS[f"Qwen/Qwen3.5-{same}"].read_text())
    expected["text_config"]["mtp_num_hidden_layers"] = 1
    assert Config.parse(content) == Config.parse(expected)


CONFIGS = BUNDLED_CONFIGS | {name: demo.folder / "config.json" for name, demo in DEMOS.items()}
FORMS = {"new": dict, "old": flat}
# Fields that only evoprune's config has, because transformers hard-codes them or does not need them.
OURS = {
    "family", "head_norms", "qwen4", "delta_net", "experts", "fullatt_block_indexes", "window_size", "tokens_per_second",
    "use_sliding_window", "num_position_embeddings", "deepstack_visual_indexes", "head_dim", "mtp_num_hidden_layers",
}  # fmt: skip


PARTS = ("delta_net", "experts", "qwen4")
NATIVE = {"qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_5"}  # families whose language model evoprune must run itself


def numbers(part):
    """Yield the names and values of all numbers in a part of a config, including those in `PARTS`."""
    for field, value in vars(part).items():
        if field in PARTS and value is not None:
            yield from vars(value).items()
        elif field not in PARTS:
            yield field, value


def check_numbers(config, theirs):
    compared = 0
    for part in ("vision_config", "text_config"):
        for field, value in numbers(getattr(config, part)):
            other = getattr(theirs, part)
            if not hasattr(other, field) and field not in ("num_experts", "rope_parameters"):
                # A field that transformers does not know has no effect.
                assert field in OURS or value in (None, (), 1), field
                continue
            if field in ("head_dim", "intermediate_size") and value is None:
                continue
            expected = getattr(other, field)
            if isinstance(value, dict):
                names = {"rope_theta", "mrope_section", "partial_rotary_factor"} & value.keys()
                value, expected = ({name: each[name] for name in names} for each in (value, expected))
            expected = tuple(expected) if isinstance(expected, list) else expected
            if field == "layer_types":
                expected = tuple(FULL if kind in INDEXED else kind for kind in expected)
            assert expected == value, field
            compared += 1
    assert compared > 20 and config.tie_word_embeddings == theirs.tie_word_embeddings


@pytest.mark.parametrize(
    "name, form", [(name, form) for name in CONFIGS for form in FORMS if form == "new" or "Qwen3" not in name]
)
def test_numbers_are_those_that_transformers_reads(name, form):
    from transformers import AutoConfig

    content = FORMS[form](json.loads(CONFIGS[name].read_text()))
    config, theirs = Config.parse(content), AutoConfig.for_model(**copy.deepcopy(content))
    back = hugging_face_config(config)
    assert type(back) is type(theirs) and config.text_config.head_norms is ("Qwen3" in name)
    check_numbers(config, theirs)
    check_numbers(config, back)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_read_as_it_was(family):
    written = tiny_config(family).to_dict()
    config = Config.parse(json.loads(json.dumps(written)))
    assert config.vision_config.family == family and FAMILIES[family].native >= (family in NATIVE)
    if family != "qwen2_vl":  # it has other names for the sizes of its tower
        check_numbers(config, tiny_config(family))
    assert Config.parse(json.loads(json.dumps(config.as_written()))) == config
    # The config survives a round trip through transformers, too.
    assert Config.parse(json.loads(hugging_face_config(config).to_json_string())) == config
    assert VisionConfig.of(tiny_config(family).vision_config) == config.vision_config


def test_what_a_file_of_qwen3_leaves_out():
    content = copy.deepcopy(CONTENTS["3"])
    for name in ("rope_parameters", "head_dim", "rms_norm_eps"):
        del content["text_config"][name]
    text = Config.parse(content).text_config
    assert (text.head_dim, text.rms_norm_eps, text.rope_parameters["mrope_section"]) == (128, 1e-6, [24, 20, 20])
    assert text.rope_parameters["mrope_interleaved"] and text.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_5_MOE, QWEN3_MOE])
def test_what_a_file_of_later_families_leaves_out(family):
    from transformers import AutoConfig

    sizes = {"hidden_size": 64, "num_hidden_layers": 9, "num_attention_heads": 2, "vocab_size": 100}
    sizes |= {} if family == QWEN3_5_MOE else {"intermediate_size": 96}
    # Otherwise hidden size / heads, which the sections do not fit.
    head = {"head_dim": 128} if family == QWEN3_MOE else {}
    tower = {"depth": 25, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    content = {"model_type": family, "text_config": sizes | head, "vision_config": tower}
    config, theirs = Config.parse(content), AutoConfig.for_model(**copy.deepcopy(content))
    text, other = config.text_config, theirs.text_config
    names = ["rms_norm_eps", "head_dim"]
    if text.delta_net:
        names += ["layer_types", "linear_conv_kernel_dim", "linear_num_key_heads", "linear_num_value_heads"]
        names += ["linear_key_head_dim", "linear_value_head_dim"]
        assert [text.is_linear(layer) for layer in range(5)] == [True, True, True, False, True]
    if text.experts:
        names += ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
        assert all(map(text.has_experts, range(9)))
    found = dict(numbers(text))
    for name in names:
        expected = getattr(other, name)
        assert found[name] == (tuple(expected) if isinstance(expected, list) else expected), name
    assert {name: text.rope_parameters[name] for name in other.rope_parameters if name != "rope_type"} == {
        name: value for name, value in other.rope_parameters.items() if name != "rope_type"
    }
    assert config.vision_config.num_position_embeddings == theirs.vision_config.num_position_embeddings
    stack = getattr(theirs.vision_config, "deepstack_visual_indexes", ())
    assert list(config.vision_config.deepstack_visual_indexes) == list(stack)


@pytest.mark.parametrize("family", [QWEN3_5, QWEN3_5_MOE, QWEN3_MOE])
def test_older_files_call_the_tower_by_the_name_of_the_model(family):
    from transformers import AutoConfig

    content = tiny_config(family).to_dict()
    expected = Config.parse(content)
    content["vision_config"] |= {"model_type": family}
    assert Config.parse(content) == expected
    assert VisionConfig.of(AutoConfig.for_model(**content).vision_config) == expected.vision_config


@pytest.mark.parametrize(
    ("rope", "beside", "share"),
    [
        ({}, {}, 0.25),
        ({}, {"partial_rotary_factor": 0.5}, 0.5),
        ({"partial_rotary_factor": 0.125}, {"partial_rotary_factor": 0.5}, 0.125),
    ],
)
def test_the_rotated_part_of_a_head_as_in_transformers(rope, beside, share):
    from transformers import AutoConfig

    content = tiny_config(QWEN3_5).to_dict()
    section = {0.125: [1, 1, 2], 0.25: [3, 3, 2], 0.5: [6, 5, 5]}[share]
    text = content["text_config"] | {"head_dim": 64, **beside}
    text["rope_parameters"] = {"rope_theta": 1e7, "mrope_section": section, **rope}
    content["text_config"] = text
    made = Config.parse(copy.deepcopy(content)).text_config.rope_parameters["partial_rotary_factor"]
    theirs = AutoConfig.for_model(**content).text_config.rope_parameters["partial_rotary_factor"]
    assert made == theirs == share


def test_layers_with_experts():
    content = tiny_config(QWEN3_MOE).to_dict()
    content["text_config"] |= {"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3]}
    text = Config.parse(content).text_config
    assert [text.has_experts(layer) for layer in range(6)] == [False, True, False, False, False, True]
    assert text.delta_net is None and not text.output_gate and not text.is_linear(0)


CONTENTS = {
    "2": QWEN2_VL_2B,
    "2.5": NEW,
    "3": json.loads(BUNDLED_CONFIGS["Qwen/Qwen3-VL-4B-Instruct"].read_text()),
    "3 experts": tiny_config(QWEN3_MOE).to_dict(),
    "3.5": tiny_config(QWEN3_5).to_dict(),
    "3.5 experts": tiny_config(QWEN3_5_MOE).to_dict(),
    "4": tiny_config(QWEN4).to_dict(),
}
TEXT, VISION = "text_config", "vision_config"
REFUSED = (  # family, part, entry, value, and the message
    ("2", VISION, "embed_dim", 0, "embed_dim is 0, not a whole number"),
    ("2", VISION, "num_heads", None, "has no num_heads"),
    ("2", VISION, "num_heads", 7, "does not fit its number of heads"),
    ("2", VISION, "hidden_size", 1280, "differs from hidden_size"),
    ("2", VISION, "hidden_act", "gelu", "only quick_gelu"),
    ("2", VISION, "mlp_ratio", 3.5, "not a whole number"),
    ("2", VISION, "embed_dim", None, "has no embed_dim"),
    ("3", TEXT, "attention_bias", True, "attention_bias"),
    ("3", TEXT, "head_dim", 96, "mrope_section"),
    ("3", VISION, "deepstack_visual_indexes", [5, 24], "deepstack_visual_indexes names layers"),
    ("3", VISION, "deepstack_visual_indexes", [11, 5], "not in ascending order"),
    ("3", VISION, "num_position_embeddings", 2300, "square"),
    ("3", VISION, "patch_size", 15, "not even"),
    ("2.5", TEXT, "hidden_size", None, "has no hidden_size"),
    ("2.5", TEXT, "hidden_size", True, "not a whole number"),
    ("2.5", TEXT, "vocab_size", 1.5, "not a whole number"),
    ("2.5", TEXT, "num_hidden_layers", 10**9, "not a whole number from 1 to 1,000"),
    ("2.5", TEXT, "rms_norm_eps", "small", "not a number from"),
    ("2.5", TEXT, "rms_norm_eps", -1, "rms_norm_eps is -1"),
    (
        "2.5",
        TEXT,
        "eos_token_id",
        "end",
        "eos_token_id is 'end', not a whole number .*, or a list of at most 64 different values, each a whole number",
    ),
    ("2.5", TEXT, "eos_token_id", list(range(65)), "at most 64 different values"),
    ("3.5", TEXT, "layer_types", [LINEAR] * 1001, "at most 1,000 values"),
    ("3 experts", TEXT, "mlp_only_layers", [0] * 1001, "at most 1,000 values"),
    ("2.5", TEXT, "max_position_embeddings", 0, "max_position_embeddings is 0"),
    ("2.5", TEXT, "num_key_value_heads", 3, "num_key_value_heads does not divide"),
    ("2.5", TEXT, "use_sliding_window", "yes", "use_sliding_window is 'yes', not true or false"),
    ("2.5", TEXT, "hidden_act", "gelu", "activation"),
    ("2.5", TEXT, "rope_parameters", "big", "rope_parameters is 'big', not an object"),
    ("2.5", TEXT, "rope_parameters", {"rope_type": "yarn"}, "rope_type 'yarn'"),
    ("2.5", TEXT, "rope_parameters", {"mrope_section": [1, 2, 3]}, "mrope_section does not fit"),
    ("2.5", TEXT, "rope_parameters", {"mrope_section": "abc"}, "mrope_section is 'abc', not a list of 3"),
    ("2.5", TEXT, "rope_parameters", {"rope_theta": -1}, "rope_theta is -1"),
    ("2.5", VISION, "depth", 10**9, "not a whole number from 1 to 1,000"),
    ("2.5", VISION, "spatial_merge_size", 3, "spatial_merge_size 3"),
    ("2.5", VISION, "temporal_patch_size", 3, "temporal_patch_size 3"),
    ("2.5", VISION, "in_channels", 4, "in_channels 4"),
    ("2.5", VISION, "out_hidden_size", 5, "differs from hidden_size"),
    ("2.5", VISION, "fullatt_block_indexes", [32], "layers that do not exist"),
    ("2.5", VISION, "fullatt_block_indexes", 7, "not a list of at most 1,000 values, each a whole number"),
    ("2.5", VISION, "fullatt_block_indexes", [True, "1"], "not a list of at most 1,000 values, each a whole number"),
    ("2.5", VISION, "tokens_per_second", -4, "tokens_per_second is -4"),
    ("2.5", VISION, "hidden_act", ["silu"], "hidden_act is ..silu.., not a string"),
    ("2.5", VISION, "window_size", 100, "not a whole number of units"),
    ("2.5", VISION, "num_heads", 7, "does not fit its number of heads"),
    ("3", VISION, "rope_parameters", {"rope_theta": 1e5}, "rope_theta 100000.0 of the tower"),
    ("2.5", VISION, "rope_parameters", {"rope_theta": 1e5}, "rope_theta 100000.0 of the tower"),
    ("2.5", VISION, "rope_parameters", {"rope_theta": [1] * 10**6}, "rope_theta .1, 1, 1, 1, 1, 1, ....* of the tower"),
    ("2", VISION, "rope_parameters", {"rope_type": "yarn"}, "rope_type 'yarn'"),
    ("3", VISION, "rope_parameters", {"rope_type": "linear"}, "rope_type 'linear'"),
    ("3", VISION, "head_dim", 8, "head_dim of the tower"),
    ("2.5", VISION, "head_dim", 8, "head_dim of the tower"),
    ("2.5", TEXT, "head_dim", 64, "does not fit the number of heads"),
    ("2.5", TEXT, "rope_parameters", {"full_attention": {"rope_theta": 1e6}}, "differ between layers"),
    ("2.5", TEXT, "is_causal", False, "not causal"),
    ("3.5", TEXT, "kv_sharing_modes", ["reuse"] * 6, "kv_sharing_modes"),
    ("3", TEXT, "per_layer_config", {"0": {"head_dim": 64}}, "per_layer_config"),
    ("3", TEXT, "sliding_window", 0, "sliding_window is 0"),
    ("3", TEXT, "sliding_window", "8", "sliding_window is '8'"),
    ("3", TEXT, "sliding_window", True, "sliding_window is True"),
    ("3", TEXT, "attention_chunk_size", 8, "attention_chunk_size"),
    ("3", TEXT, "layer_types", ["sliding_attention"] * 36, "layers without full attention"),
    ("3 experts", TEXT, "layer_types", [FULL, "chunked_attention"] * 2, "layers without full attention"),
    ("3 experts", TEXT, "num_local_experts", 0, "num_experts is 0"),
    ("3 experts", TEXT, "num_experts_per_tok", 5, "num_experts_per_tok is 5, but there are 4 experts"),
    ("3 experts", TEXT, "mlp_only_layers", ["1"], "mlp_only_layers is"),
    ("3 experts", TEXT, "decoder_sparse_step", 0, "decoder_sparse_step is 0"),
    ("3 experts", TEXT, "intermediate_size", None, "has no intermediate_size"),
    ("3 experts", TEXT, "norm_topk_prob", False, "norm_topk_prob"),
    ("3 experts", TEXT, "shared_expert_intermediate_size", 8, "shared_expert_intermediate_size 8 is not supported"),
    ("3.5 experts", TEXT, "mlp_only_layers", [1], r"mlp_only_layers \(1,\) is not supported"),
    ("3.5", TEXT, "attention_bias", True, "attention_bias"),
    ("3.5", TEXT, "attn_output_gate", False, "without an output gate"),
    ("3.5", TEXT, "output_gate_type", "sigmoid", "output_gate_type 'sigmoid'"),
    ("3.5", TEXT, "layer_types", [LINEAR, FULL], "layer_types has 2 entries for 6 layers"),
    ("3.5", TEXT, "layer_types", ["sliding_attention"] * 6, "a layer of type 'sliding_attention'"),
    ("3.5", TEXT, "layer_types", [1] * 6, "layer_types is"),
    ("3.5", TEXT, "layer_types", [LINEAR] * 6, "without attention layers"),
    ("3.5", TEXT, "linear_num_value_heads", 3, "linear_num_key_heads does not divide"),
    ("3.5", TEXT, "linear_key_head_dim", 0, "linear_key_head_dim is 0"),
    ("3.5", TEXT, "head_dim", 16, "mrope_section does not fit"),
    ("3.5", TEXT, "rope_parameters", {"partial_rotary_factor": 2}, "partial_rotary_factor is 2"),
    ("3.5", TEXT, "rope_parameters", {"rope_type": "yarn"}, "rope_type 'yarn'"),
    ("3.5", VISION, "num_position_embeddings", 2300, "square"),
    ("4", TEXT, "hc_count", 1, "hc_count is 1"),
    ("4", TEXT, "hc_lowrank", 0, "hc_lowrank is 0"),
    ("4", TEXT, "indexer_n_heads", None, "has no indexer_n_heads"),
    ("4", TEXT, "indexer_kv_heads", 2, "indexer_kv_heads is 2, not 1"),
    ("4", TEXT, "indexer_budget", 65, "indexer_compress_ratio does not divide indexer_budget"),
    ("4", TEXT, "indexer_head_dim", 8, "indexer_head_dim is less than 12"),
    ("4", TEXT, "ple_layer_ids", [3], "a layer without linear attention"),
    ("4", TEXT, "ple_layer_ids", [9], "a layer without linear attention"),
    ("4", TEXT, "ple_embed_dim", 33, "not a multiple of the n-gram heads"),
    ("4", TEXT, "ngram_vocab_size_base", 10**12, "ngram_vocab_size_base is 1000000000000"),
    ("4", TEXT, "output_gate_type", "tanh", "output_gate_type is 'tanh'"),
    ("4", TEXT, "eos_token_id", None, "has no eos_token_id"),
    ("4", TEXT, "layer_types", ["sliding_attention"] * 6, "a layer of type 'sliding_attention'"),
)


@pytest.mark.parametrize(("family", "where", "name", "value", "message"), REFUSED)
def test_what_cannot_run_is_refused(family, where, name, value, message):
    content = copy.deepcopy(CONTENTS[family])
    content.get(where, content)[name] = value
    with pytest.raises(ValueError, match=message):
        Config.parse(content)


@pytest.mark.parametrize(("outer", "inner", "expected"), [(7, 9, 7), (None, 9, 9), ([7, 8], None, (7, 8))])
def test_the_end_of_answers_beside_the_language_model_counts_more(outer, inner, expected):
    content = copy.deepcopy(CONTENTS["3.5"])
    content["eos_token_id"], content[TEXT]["eos_token_id"] = outer, inner
    assert Config.parse(content).text_config.eos_token_id == expected


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("2.5", "hidden_size"),
        ("2.5", "num_key_value_heads"),
        ("3 experts", "head_dim"),
        ("3.5", "linear_key_head_dim"),
        ("3 experts", "num_experts"),
    ],
)
def test_a_size_beside_the_language_model_is_named(family, name):
    """A size that appears in both places, or that equals the default, is accepted."""
    content = copy.deepcopy(CONTENTS[family])
    content[TEXT].pop("num_local_experts", None)
    content[TEXT].setdefault(name, 4)
    content[name] = content[TEXT][name]
    whole = Config.parse(content)
    assert whole == Config.parse(content[TEXT] | {name: value for name, value in content.items() if name != TEXT})
    del content[TEXT][name]
    with pytest.raises(ValueError, match=f"{name} is next to text_config instead of inside it"):
        Config.parse(content)


def outcome(content):
    try:
        return Config.parse(content)
    except ValueError as problem:
        return str(problem)


def objects(content):
    yield content
    for value in content.values():
        if isinstance(value, dict):
            yield from objects(value)


@pytest.mark.parametrize(
    "content",
    [NEW, flat(NEW), *(CONTENTS[family] for family in ("2", "3", "3 experts", "3.5", "3.5 experts"))],
    ids=["new", "flat", "qwen2", "qwen3", "qwen3_experts", "qwen3_5", "qwen3_5_experts"],
)
def test_null_is_missing(content):
    more = (
        "rope_theta",
        "mrope_section",
        "rope_type",
        "type",
        "rope_parameters",
        "rope_scaling",
        "tie_word_embeddings",
    )
    more = (*more, "attention_bias", "in_chans", "text_config", "use_sliding_window", "head_dim", "hidden_act")
    for number, original in enumerate(objects(content)):
        for name in {*original, *more} - {"model_type"}:
            made = []
            for missing in (True, False):
                changed = copy.deepcopy(content)
                at = [*objects(changed)][number]
                at.pop(name, None)
                if not missing:
                    at[name] = None
                made.append(outcome(changed))
            assert made[0] == made[1], name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("outer", [True, False, None])
@pytest.mark.parametrize("inner", [True, False, None])
def test_embeddings_are_tied_where_transformers_ties_them(outer, inner, family):
    from transformers import AutoConfig

    content = tiny_config(family).to_dict()
    for at, tied in ((content, outer), (content["text_config"], inner)):
        at.pop("tie_word_embeddings", None)
        if tied is not None:
            at["tie_word_embeddings"] = tied
    expected = AutoConfig.for_model(**copy.deepcopy(content)).tie_word_embeddings
    assert Config.parse(content).tie_word_embeddings == expected == bool(outer or (inner and "qwen2" in family))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_window_layers": 28},
        {"max_window_layers": 36},
        {"max_window_layers": 28, "sliding_window": None},
        {"max_window_layers": 0, "layer_types": ["full_attention"] * 36},
        {"layer_types": ["full_attention"] * 35 + ["sliding_attention"]},
    ],
)
def test_a_sliding_window_counts_where_transformers_has_layers_with_one(given):
    from transformers import Qwen2_5_VLConfig

    content = copy.deepcopy(NEW)
    content["text_config"] |= {"use_sliding_window": True, **given}
    theirs = Qwen2_5_VLConfig.from_dict(copy.deepcopy(content)).text_config
    if "sliding_attention" in theirs.layer_types:
        with pytest.raises(Unsupported, match="sliding window"):
            Config.parse(content)
    else:
        assert not Config.parse(content).text_config.use_sliding_window


# Settings that have no effect in transformers, by family.
WITHOUT_EFFECT = [
    ("2", {"sliding_window": 8, "use_sliding_window": False, "attention_chunk_size": 8}),
    ("2.5", {"sliding_window": 8, "use_sliding_window": False, "attention_bias": True, "attention_dropout": 0.5}),
    ("2.5", {"initializer_range": 9.0, "use_cache": False, "pad_token_id": 3, "router_aux_loss_coef": 9.0}),
    ("2.5", {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0, "norm_topk_prob": False}),
    ("3", {"use_sliding_window": True, "max_window_layers": 0, "attention_dropout": 0.5}),
    ("3", {"sliding_window": 8, "layer_types": [FULL] * 36}),
    ("3", {"sliding_window": 2**30, "use_sliding_window": False}),
    ("3 experts", {"sliding_window": None, "use_sliding_window": True, "output_router_logits": True}),
    ("3.5", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0, "attention_chunk_size": 8}),
    ("3.5 experts", {"sliding_window": 8, "use_sliding_window": False, "router_aux_loss_coef": 9.0}),
]


@pytest.mark.parametrize(("family", "given"), WITHOUT_EFFECT)
def test_settings_without_effect_are_ignored(family, given):
    content = copy.deepcopy(CONTENTS[family])
    known = Config.parse(content)
    content.get(TEXT, content).update(given)
    assert replace(Config.parse(content).text_config, use_sliding_window=False) == known.text_config


def test_only_the_family_decides_on_interleaving():
    """Files of other families may name it, but transformers interleaves nothing in them."""
    content = copy.deepcopy(NEW)
    content["text_config"]["rope_parameters"] = {"mrope_section": [16, 24, 24], "mrope_interleaved": True}
    assert "mrope_interleaved" not in Config.parse(content).text_config.rope_parameters
    content = copy.deepcopy(CONTENTS["3"])
    content["text_config"]["rope_scaling"] = {"mrope_section": [24, 20, 20], "mrope_interleaved": False}
    assert Config.parse(content).text_config.rope_parameters["mrope_interleaved"] is True


def test_no_checkpoint_belongs_to_two_families():
    """A family that is a copy of another one must not also claim its checkpoints."""
    files = [each for family in FAMILIES.values() for each in family.published]
    assert len({*files}) == len(files)


def test_families_have_different_classes():
    assert len({family.model for family in FAMILIES.values()}) == len(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_default_rotary_sections_fill_the_heads(family):
    """Each section has the number of feature pairs of one position axis."""
    text = FAMILIES[family].text
    if "head_dim" in text:
        assert 2 * sum(text["mrope_section"]) == text["head_dim"] * text.get("partial_rotary_factor", 1)
