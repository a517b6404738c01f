"""The content of a `config.json` of Qwen2-VL, Qwen2.5-VL or Qwen3-VL, under Hugging Face's names. Needs no torch, no transformers.

Published checkpoints keep the language model's numbers at the top level, newer ones in `text_config`; both are read. A model
that this program could not run faithfully is refused here, before any weights are read.

What differs between the families is written down here as values. Only `vision/families.py` asks for a family by name, too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Annotated, Any

from evoprune.model.rules import OBJECT, TEXT, YES_OR_NO, either, list_of, number, pick, section, whole

Layers = Annotated[int, whole(1, 1000)]  # far more than any model has, and still built in a second
SIZE = whole(1, 2**22)
Size = Annotated[int, SIZE]
Tokens = Annotated[int, whole(1, 2**24)]
Text = Annotated[str, TEXT]
YesOrNo = Annotated[bool, YES_OR_NO]
LayerNumbers = Annotated[tuple[int, ...], list_of(whole(0, 1000))]
TOKEN_ID = whole(0, 2**31)
END_IDS = either(TOKEN_ID, list_of(TOKEN_ID))  # of the tokens that end an answer
ROPE_THETA, MROPE_SECTION = number(1e-6, 1e15), list_of(whole(0, 2**16), 3)

QWEN2_5, QWEN2, QWEN3 = "qwen2_5_vl", "qwen2_vl", "qwen3_vl"
MODEL_TYPES = (QWEN2_5, QWEN2, QWEN3)
EXPERTS = "qwen3_vl_moe"  # a model type of which only the tower is a known one
PATCHES = 4  # of a unit: 2x2
ANSWER_COLUMNS = 256  # that a prompt's KV cache has to spare: an answer of the usual length needs no second cache


@dataclass(frozen=True)
class Family:
    """How a family of models differs from the others."""

    hidden_act: str  # of the tower
    layer_norms: bool  # whether the tower has these, with a bias; else RMS norms
    mlp: tuple[str, ...]  # names of the matrices of a tower layer's MLP; of three, the first two make a gated one
    merger: tuple[str, str, str]  # names of the patch merger's norm and of its two matrices
    text: Mapping[str, Any]  # settings of the language model, and of its rotary embedding, where a file does not say
    video: Mapping[str, Any]  # what the published processor does with inputs (`video.plan.InputLimits`)
    picture: Mapping[str, Any]
    unstated: Mapping[str, Any]  # the same for pictures, where a model's folder has no settings of a processor
    vision: Mapping[str, Any]  # settings of the tower, where a file does not say
    timestamps: bool = False  # whether a prompt has the time of each frame pair, and markers around its tokens


_MERGER = ("ln_q", "mlp.0", "mlp.2")
_TEXT = {"rope_theta": 1e6, "mrope_section": [16, 24, 24]}
_PICTURES = {"min_pixels": 56 * 56, "max_pixels": 12_845_056}, {"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_LARGE = _HALF | {"min_pixels": 65_536, "max_pixels": 16_777_216, "of_all_frames": False}
_TANH, _MLP = "gelu_pytorch_tanh", ("linear_fc1", "linear_fc2")
_QWEN3_TEXT = {"rope_theta": 5e5, "mrope_section": [24, 20, 20], "rms_norm_eps": 1e-6, "head_dim": 128}
_QWEN3_VIDEO = _HALF | {"min_pixels": 4096, "max_pixels": 25_165_824, "of_all_frames": True}
_TOWER = {"num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24), "patch_size": 16}
_QWEN3 = _QWEN3_TEXT, _QWEN3_VIDEO, _LARGE, _LARGE, _TOWER | {"hidden_act": _TANH}
FAMILIES = {
    QWEN2_5: Family("silu", False, ("gate_proj", "up_proj", "down_proj"), _MERGER, _TEXT, {}, *_PICTURES, {}),
    QWEN2: Family("quick_gelu", True, ("fc1", "fc2"), _MERGER, _TEXT, {}, *_PICTURES, {"hidden_act": "quick_gelu"}),
    QWEN3: Family(_TANH, True, _MLP, ("norm", *_MLP), *_QWEN3, timestamps=True),
}


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of any family."""

    depth: Layers
    hidden_size: Size  # features of a patch in the tower
    intermediate_size: Size  # and inside its MLPs
    num_heads: Size
    out_hidden_size: Size  # features of a unit after the merger: the language model's hidden size
    fullatt_block_indexes: LayerNumbers  # that attend over whole frame pairs; in Qwen2-VL and Qwen3-VL all of them
    window_size: Size = 112  # of attention, in pixels; where no layer attends over windows, it only orders the rows
    patch_size: Size = 14  # side in pixels
    temporal_patch_size: Size = 2  # frames in a frame pair
    spatial_merge_size: Size = 2  # side of a unit in patches
    in_channels: Size = 3
    tokens_per_second: Annotated[int | float | None, number(1e-3, 1e6)] = 4  # None if M-RoPE counts frame pairs
    hidden_act: Text = "silu"
    num_position_embeddings: Annotated[int | None, SIZE] = None  # entries of the square table of learned positions
    # Ascending: layers after which a merger of their own makes features for the language model's first layers (DeepStack).
    deepstack_visual_indexes: LayerNumbers = ()
    family: str = QWEN2_5  # one of `MODEL_TYPES`

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def layers_read(self) -> int:
        """How many layers' features make a visual token: the last one's, and those of DeepStack."""
        return 1 + len(self.deepstack_visual_indexes)


@dataclass(frozen=True)
class Qwen2Sizes:
    """What Qwen2-VL's files call otherwise: `hidden_size` is the language model's, `embed_dim` the tower's."""

    embed_dim: Size
    hidden_size: Size
    mlp_ratio: Annotated[int, whole(1, 1000)] = 4


@dataclass(frozen=True)
class TextConfig:
    """The language model."""

    vocab_size: Tokens
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    # `rope_theta`, `mrope_section` and, where the three positions take turns, `mrope_interleaved`
    rope_parameters: Annotated[dict[str, Any], OBJECT]
    rms_norm_eps: Annotated[float, number(1e-30, 1)] = 1e-5
    hidden_act: Text = "silu"
    use_sliding_window: YesOrNo = False
    eos_token_id: Annotated[int | tuple[int, ...] | None, END_IDS] = None
    # The length of its context: how many tokens it reads and writes together; None if the file does not say
    max_position_embeddings: Annotated[int | None, whole(1, 2**31)] = None
    head_dim: Annotated[int | None, whole(1, 2**16)] = None  # see `head_size`
    head_norms: bool = False  # whether queries and keys are normed head by head, and have no bias


@dataclass(frozen=True)
class Config:
    """Vision tower and language model, and whether input and output embeddings share one matrix."""

    vision_config: VisionConfig
    text_config: TextConfig
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class GenerationSettings:
    """What a `generation_config.json` says of choosing tokens; None where it says nothing."""

    eos_token_id: Annotated[int | tuple[int, ...] | None, END_IDS] = None
    do_sample: Annotated[bool | None, YES_OR_NO] = None
    temperature: Annotated[float | None, number(0, 1e6)] = None
    top_k: Annotated[int | None, whole(0, 2**31)] = None
    top_p: Annotated[float | None, number(0, 1)] = None
    repetition_penalty: Annotated[float | None, number(1e-3, 1e3)] = None


class Unsupported(ValueError):
    """This program cannot run a model, whose config is valid."""


def parse_config(content: dict) -> Config:
    """Reads the content of a `config.json`.

    Raises ValueError: a number is missing or out of range. Unsupported: this program cannot run the model.
    """
    family = content.get("model_type") or QWEN2_5
    text, vision = section(content, "text_config") or content, section(content, "vision_config")
    # Either place ties them, as in transformers: earlier versions wrote the one in `text_config` alone.
    tied = [each.get("tie_word_embeddings") for each in (content, text)]
    tied = any([YES_OR_NO.check(each, "tie_word_embeddings") for each in tied if each is not None])
    config = Config(parse_vision(vision, family), _parse_text(text, family), tied)
    check_vision(config.vision_config)
    _check_text(config.text_config)
    _check_rope(section(content, "rope_scaling"))  # nothing reads it where there is a `text_config`
    same = config.vision_config.out_hidden_size == config.text_config.hidden_size
    _check(same, "tower and language model differ in size")
    return config


def _parse_text(text: dict, family: str) -> TextConfig:
    """Reads the settings of the language model, wherever they stand. Raises ValueError as `parse_config`."""
    usual = FAMILIES[family].text
    given = usual | {name: value for name, value in text.items() if value is not None}
    # The earlier name counts more, as in transformers: guides to YaRN add it to a file that has the other.
    rope = section(text, "rope_scaling") or section(text, "rope_parameters")
    rope = {name: given[name] for name in ("rope_theta", "mrope_section")} | {
        name: value for name, value in rope.items() if value is not None
    }
    if family == QWEN3:
        rope["mrope_interleaved"] = True
        _check_supported(not text.get("attention_bias"), "attention_bias is not supported")
    heads = text.get("num_key_value_heads") or text.get("num_attention_heads")
    picked = pick(TextConfig, given | {"rope_parameters": rope, "num_key_value_heads": heads}, "text_config")
    slides = picked.use_sliding_window and _slides(given, picked.num_hidden_layers)
    slides = slides and text.get("sliding_window", True) is not None
    return replace(picked, head_norms=family == QWEN3, use_sliding_window=slides)


def _slides(given: Mapping[str, Any], depth: int) -> bool:
    """Whether some layer attends over a sliding window, as transformers decides it where these are in use."""
    if "layer_types" in given:
        return "sliding_attention" in list_of(TEXT).check(given["layer_types"], "text_config.layer_types")
    return whole(0, 2**31).check(given.get("max_window_layers", 80), "text_config.max_window_layers") < depth


def head_size(text) -> int:
    """Features of a head of the language model. `text`: a `TextConfig`, or that of transformers."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _check_rope(rope: dict) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    _check_supported(kind in ("default", "mrope"), f"rope_type {kind!r} is not supported, only Qwen's own")


def _check_text(t: TextConfig) -> None:
    """Raises ValueError if this program cannot run the language model faithfully."""
    rope = t.rope_parameters
    _check_rope(rope)
    _check_supported(not t.use_sliding_window, "sliding window attention is not supported")
    _check_supported(t.hidden_act == "silu", f"activation {t.hidden_act} is not supported, only silu")
    divides = t.head_dim is not None or t.hidden_size % (2 * t.num_attention_heads) == 0
    _check(divides, "hidden_size does not divide into heads")
    _check(t.num_attention_heads % t.num_key_value_heads == 0, "key/value heads do not divide the heads")
    section = MROPE_SECTION.check(rope["mrope_section"], "mrope_section")
    _check(2 * sum(section) == head_size(t), "mrope_section does not fit the heads")
    ROPE_THETA.check(rope["rope_theta"], "rope_theta")


def parse_vision(content: dict, family: str) -> VisionConfig:
    """Reads the `vision_config` of a model of one of `MODEL_TYPES`. Raises ValueError: a number is missing, or is not one."""
    given = {"in_channels": content.get("in_chans", 3)} | FAMILIES[family].vision
    given |= {name: value for name, value in content.items() if value is not None}
    if family == QWEN2:
        own = pick(Qwen2Sizes, given, "vision_config")
        given |= {"hidden_size": own.embed_dim, "out_hidden_size": own.hidden_size}
        given["intermediate_size"] = own.embed_dim * own.mlp_ratio
    if family != QWEN3:
        given |= {"num_position_embeddings": None, "deepstack_visual_indexes": None}
    if family == QWEN2_5:
        return pick(VisionConfig, given, "vision_config")
    picked = pick(VisionConfig, given | {"fullatt_block_indexes": [], "window_size": None}, "vision_config")
    window = 4 * picked.patch_size * picked.spatial_merge_size  # of no effect: no layer attends over windows
    every = tuple(range(picked.depth))
    return replace(picked, fullatt_block_indexes=every, window_size=window, tokens_per_second=None, family=family)


def vision_sizes(config) -> VisionConfig:
    """The config of a tower, from ours or that of transformers. Raises ValueError as `parse_vision`."""
    if isinstance(config, VisionConfig):
        return config
    return parse_vision(vars(config), config.model_type.removesuffix("_vision"))


def check_vision(v: VisionConfig) -> None:
    """Raises ValueError if this program cannot run the tower faithfully."""
    act = v.traits.hidden_act
    _check_supported(v.hidden_act == act, f"activation {v.hidden_act} of the tower is not supported, only {act}")
    for name, only in (("spatial_merge_size", 2), ("temporal_patch_size", 2), ("in_channels", 3)):
        _check_supported(getattr(v, name) == only, f"{name} {getattr(v, name)} is not supported, only {only}")
    _check(v.patch_size % 2 == 0, f"patch_size {v.patch_size} is not even")
    _check(v.hidden_size % (4 * v.num_heads) == 0, "the tower's hidden_size does not divide into heads")
    _check(v.window_size % (v.patch_size * v.spatial_merge_size) == 0, "window_size is no whole number of units")
    for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
        _check(all(0 <= i < v.depth for i in getattr(v, name)), f"{name} names layers that are not there")
    after = v.deepstack_visual_indexes
    _check(all(a < b for a, b in pairwise(after)), "deepstack_visual_indexes do not ascend")
    table = v.num_position_embeddings or 4
    _check(table > 1 and math.isqrt(table) ** 2 == table, f"{table} learned positions do not fill a square")


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def _check_supported(holds: bool, problem: str) -> None:
    if not holds:
        raise Unsupported(problem)


def as_written(config: Config) -> dict[str, Any]:
    """The content of a `config.json` that `parse_config` reads as this config; it has no ids of special tokens."""
    content = asdict(config, dict_factory=_as_json)
    vision, text = content["vision_config"], content["text_config"]
    family = vision.pop("family")
    del text["head_norms"]
    if family == QWEN2:
        wide = vision["hidden_size"]
        vision |= {"embed_dim": wide, "hidden_size": vision["out_hidden_size"]}
        vision["mlp_ratio"] = vision["intermediate_size"] // wide
    text["rope_parameters"] = {"rope_type": "default"} | text["rope_parameters"]
    return {"model_type": family, **content}


def _as_json(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in fields if value is not None}


def kv_bytes(config: Config, tokens: int | Sequence[int], bytes_each: int = 2) -> int:
    """Bytes of the language model's keys and values for a prompt of `tokens`, in each layer or in all."""
    text = config.text_config
    every = text.num_hidden_layers * tokens if isinstance(tokens, int) else sum(tokens)
    return 2 * text.num_key_value_heads * head_size(text) * every * bytes_each
