"""Parse and validate a model's `config.json`. This module imports neither torch nor transformers.

`Config.parse` reads the config of a Qwen2-VL, Qwen2.5-VL, Qwen3-VL, or Qwen3.5 model, and keeps the Hugging Face names. It supports
both older checkpoints, with language model settings at the top level, and newer checkpoints, with language model settings in
`text_config`. Models that evoprune cannot reproduce faithfully are rejected before any weights are read. `FAMILIES` lists the
differences between model families.
"""

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from typing import Annotated, Any, Self

from evoprune.model.qwen4 import DEFAULTS, INDEXED, Qwen4
from evoprune.untrusted import OBJECT, TEXT, YES_OR_NO, Rule, pick, section

QWEN2_5 = "qwen2_5_vl"
QWEN2 = "qwen2_vl"
QWEN3 = "qwen3_vl"
QWEN3_MOE = "qwen3_vl_moe"
QWEN3_5 = "qwen3_5"
QWEN3_5_MOE = "qwen3_5_moe"
QWEN4 = "qwen4_exp"
PATCHES = 4  # number of patches in a unit (2x2)
ANSWER_COLUMNS = 256  # KV cache columns to allocate in addition to the prompt, enough for a typical answer

Layers = Annotated[
    int, Rule.whole(1, 1000)
]  # more layers than in any real model, but few enough to build within a second
SIZE = Rule.whole(1, 2**22)
Size = Annotated[int, SIZE]
LayerNumbers = Annotated[tuple[int, ...], Rule.list_of(Rule.whole(0, 1000))]
# The two types of language model layers.
FULL = "full_attention"
LINEAR = "linear_attention"
# Language model settings of transformers that apply to all families, and that evoprune does not compute.
UNSUPPORTED = "kv_sharing_modes", "per_layer_config"
TOKEN = Rule.whole(0, 2**31)
MAX_ENDS = 64  # maximum number of tokens that end an answer
EndIds = Annotated[  # IDs of the tokens that end an answer, possibly with repetitions
    int | tuple[int, ...] | None, TOKEN | Rule.set_of(TOKEN, MAX_ENDS)
]


@dataclass(frozen=True)
class Family:
    """The settings that differ between model families."""

    series: tuple[str, ...]  # names of the published series, as in messages and hub IDs
    published: tuple[str, ...]  # published checkpoints whose configuration isn't bundled
    model: str  # name of the model class in transformers, without the ForConditionalGeneration suffix
    tower: str  # name of the vision tower class in transformers
    hidden_act: str  # the tower's activation function
    layer_norms: bool  # whether the tower has layer norms with a bias instead of RMS norms
    mlp: tuple[str, ...]  # names of the matrices in the tower's MLPs; gated MLPs have three matrices
    merger: tuple[str, str, str]  # names of the patch merger's norm and its two matrices
    text: Mapping[str, Any]  # default settings for the language model and its rotary embedding
    video: Mapping[str, Any]  # settings of the published video processor (`video.plan.InputLimits`)
    picture: Mapping[str, Any]  # settings of the published processor for still images
    unstated: Mapping[str, Any]  # settings for still images if the model folder doesn't contain any
    vision: Mapping[str, Any]  # default settings of the tower
    windows: bool = False  # whether tower layers use window attention and M-RoPE uses seconds
    embed_dim: bool = False  # whether config files use the names from `Qwen2Sizes`
    head_norms: bool = False  # whether the language model normalizes queries and keys
    timestamps: bool = False  # whether prompts contain a timestamp and markers for each frame pair
    answer_windows: bool = False  # whether transformers obeys `sliding_window` alone, and only while it generates
    native: bool = True  # whether `language/decoder.py` runs the language model, instead of transformers
    native_on_host: bool = False  # whether `language/decoder.py` runs it on CPUs, and transformers on other devices
    transposes_experts: bool = False  # whether checkpoints may contain the transposed matrices of the experts


_QWEN2_5 = Family(
    series=("Qwen2.5-VL",),
    published=("Qwen2.5-VL-32B-Instruct", "Qwen2.5-VL-72B-Instruct"),
    model="Qwen2_5_VL",
    tower="Qwen2_5_VisionTransformerPretrainedModel",
    hidden_act="silu",
    layer_norms=False,
    mlp=("gate_proj", "up_proj", "down_proj"),
    merger=("ln_q", "mlp.0", "mlp.2"),
    text={"rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    video={},
    picture={"min_pixels": 56 * 56, "max_pixels": 12_845_056},
    unstated={"min_pixels": 56 * 56, "max_pixels": 1280 * 28 * 28},
    vision={},
    windows=True,
)
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_QWEN3_PICTURE = _HALF | {"min_pixels": 65_536, "max_pixels": 16_777_216, "of_all_frames": False}
_QWEN3_TEXT = {"rope_theta": 5e5, "mrope_section": [24, 20, 20], "rms_norm_eps": 1e-6}
_QWEN3 = Family(
    series=("Qwen3-VL",),
    published=(
        "Qwen3-VL-32B-Instruct",
        *(f"Qwen3-VL-{size}-Thinking" for size in ("2B", "4B", "8B", "32B")),
    ),
    model="Qwen3VL",
    tower="Qwen3VLVisionModel",
    hidden_act="gelu_pytorch_tanh",
    layer_norms=True,
    mlp=("linear_fc1", "linear_fc2"),
    merger=("norm", "linear_fc1", "linear_fc2"),
    text=_QWEN3_TEXT | {"head_dim": 128},
    video=_HALF | {"min_pixels": 4096, "max_pixels": 25_165_824, "of_all_frames": True},
    picture=_QWEN3_PICTURE,
    unstated=_QWEN3_PICTURE,
    vision={"num_position_embeddings": 2304, "deepstack_visual_indexes": (8, 16, 24), "patch_size": 16},
    head_norms=True,
    timestamps=True,
    answer_windows=True,
)
_QWEN3_5_TEXT = {
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.25,
    "mrope_section": [11, 11, 10],
    "rms_norm_eps": 1e-6,
    "head_dim": 256,
    "full_attention_interval": 4,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
_QWEN3_5_EXPERTS = {
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
_QWEN3_5 = replace(
    _QWEN3,
    series=("Qwen3.8", "Qwen3.6", "Qwen3.5"),
    published=(),
    model="Qwen3_5",
    tower="Qwen3_5VisionModel",
    text=_QWEN3_5_TEXT,
    vision={"num_position_embeddings": 2304, "patch_size": 16},  # no DeepStack
    answer_windows=False,
)
FAMILIES = {
    QWEN2_5: _QWEN2_5,
    QWEN2: replace(
        _QWEN2_5,
        series=("Qwen2-VL",),
        published=("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct", "Qwen2-VL-72B-Instruct"),
        model="Qwen2VL",
        tower="Qwen2VisionTransformerPretrainedModel",
        hidden_act="quick_gelu",
        layer_norms=True,
        mlp=("fc1", "fc2"),
        windows=False,
        embed_dim=True,
    ),
    QWEN3: _QWEN3,
    QWEN3_MOE: replace(
        _QWEN3,
        published=("Qwen3-VL-235B-A22B-Instruct", "Qwen3-VL-30B-A3B-Thinking", "Qwen3-VL-235B-A22B-Thinking"),
        model="Qwen3VLMoe",
        tower="Qwen3VLMoeVisionModel",
        text=_QWEN3_TEXT | {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
        native=False,
        native_on_host=True,
        transposes_experts=True,
    ),
    QWEN3_5: _QWEN3_5,
    QWEN3_5_MOE: replace(
        _QWEN3_5,
        published=("Qwen3.5-122B-A10B", "Qwen3.5-397B-A17B"),
        model="Qwen3_5Moe",
        tower="Qwen3_5MoeVisionModel",
        text=_QWEN3_5_TEXT | _QWEN3_5_EXPERTS,
        native=False,
        native_on_host=True,
    ),
    QWEN4: replace(
        _QWEN3_5,
        model="Qwen4Exp",
        tower="Qwen4ExpVisionModel",
        text=_QWEN3_5_TEXT | _QWEN3_5_EXPERTS | DEFAULTS,
        native=False,
    ),
}


@dataclass(frozen=True)
class VisionConfig:
    """The configuration of a vision tower, for all model families."""

    depth: Layers
    hidden_size: Size  # number of features per patch
    intermediate_size: Size  # number of features per patch inside the MLPs
    num_heads: Size
    out_hidden_size: Size  # number of features per merged unit, equal to the language model's hidden size
    fullatt_block_indexes: LayerNumbers  # layers with full attention in a frame pair (all, except in Qwen2.5-VL)
    window_size: Size = 112  # attention window size in pixels; without window attention, it only affects the row order
    patch_size: Size = 14  # patch width and height in pixels
    temporal_patch_size: Size = 2  # number of frames in a frame pair
    spatial_merge_size: Size = 2  # unit width and height in patches
    in_channels: Size = 3
    tokens_per_second: Annotated[int | float | None, Rule.number(1e-3, 1e6)] = 4  # None if M-RoPE counts frame pairs
    hidden_act: Annotated[str, TEXT] = "silu"
    num_position_embeddings: Annotated[int | None, SIZE] = None  # entries in the square table of learned positions
    # Indices of the layers with their own merger, in ascending order. The features from each of these mergers are added in one of
    # the first language model layers (DeepStack).
    deepstack_visual_indexes: LayerNumbers = ()
    family: str = QWEN2_5  # one of `FAMILIES`

    @property
    def traits(self) -> Family:
        return FAMILIES[self.family]

    @property
    def layers_read(self) -> int:
        """Number of tower layers whose features contribute to a visual token (the last layer and the DeepStack layers)."""
        return 1 + len(self.deepstack_visual_indexes)

    @classmethod
    def of(cls, config) -> Self:
        """Convert a transformers model's vision config to a `VisionConfig`. A `VisionConfig` is returned unchanged.

        Raises:
            ValueError: If a numeric field is missing or not a number.
        """
        if isinstance(config, cls):
            return config
        return _parse_vision(vars(config), config.model_type.removesuffix("_vision"))

    def check(self) -> None:
        """Raise ValueError if evoprune cannot reproduce this vision tower faithfully."""
        act = self.traits.hidden_act
        problem = f"activation {self.hidden_act} of the tower is not supported, only {act}"
        _check(self.hidden_act == act, problem, Unsupported)
        for name, only in (("spatial_merge_size", 2), ("temporal_patch_size", 2), ("in_channels", 3)):
            value = getattr(self, name)
            _check(value == only, f"{name} {value} is not supported, only {only}", Unsupported)
        _check(self.patch_size % 2 == 0, f"patch_size {self.patch_size} is not even")
        _check(self.hidden_size % (4 * self.num_heads) == 0, "the tower's hidden_size does not fit its number of heads")
        _check(
            self.window_size % (self.patch_size * self.spatial_merge_size) == 0,
            "window_size is not a whole number of units",
        )
        for name in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            _check(all(0 <= i < self.depth for i in getattr(self, name)), f"{name} names layers that do not exist")
        after = self.deepstack_visual_indexes
        _check(all(a < b for a, b in pairwise(after)), "deepstack_visual_indexes are not in ascending order")
        table = self.num_position_embeddings or 4
        _check(table > 1 and math.isqrt(table) ** 2 == table, f"{table} learned positions do not fill a square")


@dataclass(frozen=True)
class Qwen2Sizes:
    """Vision tower sizes, using the names in Qwen2-VL config files.

    In these files, `embed_dim` is the tower's hidden size, and `hidden_size` is the language model's hidden size.
    """

    embed_dim: Size
    hidden_size: Size
    mlp_ratio: Annotated[int, Rule.whole(1, 1000)] = 4


@dataclass(frozen=True)
class DeltaNet:
    """Settings for Gated DeltaNet layers (arXiv 2412.06464), which replace attention in most layers of some models.

    Unlike a KV cache, the state of a Gated DeltaNet doesn't grow with the prompt length.
    """

    layer_types: Annotated[tuple[str, ...], Rule.list_of(TEXT)]  # `FULL` or `LINEAR` for each language model layer
    linear_conv_kernel_dim: Annotated[int, Rule.whole(1, 1000)]  # kernel size of the convolution, in columns
    linear_num_key_heads: Size
    linear_num_value_heads: Size  # a multiple of `linear_num_key_heads`
    linear_key_head_dim: Size
    linear_value_head_dim: Size

    @property
    def key_size(self) -> int:
        return self.linear_num_key_heads * self.linear_key_head_dim

    @property
    def channels(self) -> int:
        """Number of features that pass through the convolution: all queries, keys, and values."""
        return 2 * self.key_size + self.value_size

    @property
    def value_size(self) -> int:
        return self.linear_num_value_heads * self.linear_value_head_dim


@dataclass(frozen=True)
class Experts:
    """Mixture-of-experts (MoE) settings, including which layers have experts instead of an MLP."""

    num_experts: Annotated[int, Rule.whole(1, 2**16)]
    num_experts_per_tok: Annotated[int, Rule.whole(1, 2**16)]  # number of experts that process each token
    moe_intermediate_size: Size  # inner size of each expert
    shared_expert_intermediate_size: Annotated[int | None, SIZE] = None  # inner size of the shared expert
    decoder_sparse_step: Annotated[int, Rule.whole(1, 1000)] = 1  # interval between layers with experts
    mlp_only_layers: LayerNumbers = ()  # layers that never have experts


@dataclass(frozen=True)
class TextConfig:
    """The configuration of the language model."""

    vocab_size: Annotated[int, Rule.whole(1, 2**24)]
    hidden_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    # Always includes `rope_theta` and `mrope_section`. Also includes `mrope_interleaved` if feature pairs for time, height, and
    # width are interleaved, and `partial_rotary_factor` if only part of each head is rotated.
    rope_parameters: Annotated[dict[str, Any], OBJECT]
    # Inner size of the MLPs; may be None if all layers have experts.
    intermediate_size: Annotated[int | None, SIZE] = None
    rms_norm_eps: Annotated[float, Rule.number(1e-30, 1)] = 1e-5
    hidden_act: Annotated[str, TEXT] = "silu"
    use_sliding_window: Annotated[bool, YES_OR_NO] = False
    # Number of columns that an answer token attends to, including itself, or None for all columns. Prompt tokens always attend to
    # all columns before them, because transformers applies this setting only to the KV cache.
    sliding_window: int | None = None
    eos_token_id: EndIds = None
    # The context length, which is the maximum total number of tokens in the prompt and the answer, or None if unknown.
    max_position_embeddings: Annotated[int | None, Rule.whole(1, 2**31)] = None
    head_dim: Annotated[int | None, Rule.whole(1, 2**16)] = None  # see `head_size`
    head_norms: bool = False  # whether queries and keys are normalized per head and have no bias
    delta_net: DeltaNet | None = None
    experts: Experts | None = None
    qwen4: Qwen4 | None = None
    # Number of layers for multi-token prediction (MTP), which predict the token after the next one: 0 or 1.
    mtp_num_hidden_layers: Annotated[int, Rule.whole(0, 1000)] = 0

    @property
    def mtp(self) -> Self:
        """The config of the layer for multi-token prediction, as that of a language model with a single attention layer."""
        net = replace(self.delta_net, layer_types=(FULL,))
        return replace(self, num_hidden_layers=1, delta_net=net, mtp_num_hidden_layers=0)

    @property
    def reads_ids(self) -> bool:
        """Whether the language model requires token IDs in addition to embeddings."""
        return self.qwen4 is not None and len(self.qwen4.ple_layer_ids) > 0

    @property
    def output_gate(self) -> bool:
        """Whether attention layers multiply their output by a gate that is projected together with the queries."""
        return self.delta_net is not None

    def is_linear(self, layer: int) -> bool:
        """Return True if the layer with the given zero-based index is a Gated DeltaNet."""
        return self.delta_net is not None and self.delta_net.layer_types[layer] == LINEAR

    @property
    def linear_layers(self) -> tuple[int, ...]:
        """The zero-based indices of the layers that are Gated DeltaNets."""
        return tuple(filter(self.is_linear, range(self.num_hidden_layers)))

    def has_experts(self, layer: int) -> bool:
        experts = self.experts
        return (
            experts is not None
            and layer not in experts.mlp_only_layers
            and (layer + 1) % experts.decoder_sparse_step == 0
        )


@dataclass(frozen=True)
class Config:
    """The complete configuration of a model: its vision tower, its language model, and shared settings.

    `tie_word_embeddings` is True if the input embeddings and the output layer share a single matrix.
    """

    vision_config: VisionConfig
    text_config: TextConfig
    tie_word_embeddings: bool = False

    @classmethod
    def parse(cls, content: dict) -> Self:
        """Parse the contents of a `config.json`.

        Raises:
            ValueError: If a numeric setting is missing or out of range.
            Unsupported: If the config is valid, but evoprune doesn't support the model.
        """
        family = content.get("model_type") or QWEN2_5
        text = section(content, "text_config") or content
        vision = section(content, "vision_config")
        _check_misplaced_sizes(content, family)
        if content.get("eos_token_id") is not None:  # as in transformers, the top level overrides `text_config`
            text = text | {"eos_token_id": content["eos_token_id"]}
        # As in transformers, embeddings in families without head norms are tied if specified at the top level or in `text_config`,
        # because earlier versions wrote this setting to `text_config`.
        tied = [part.get("tie_word_embeddings") for part in (content, text)]
        tied = [value is not None and YES_OR_NO.check(value, "tie_word_embeddings") for value in tied]
        tied = tied[0] if FAMILIES[family].head_norms else any(tied)
        config = cls(_parse_vision(vision, family), _parse_text(text, family), tied)
        config.vision_config.check()
        _check_rope(section(content, "rope_scaling"))  # would otherwise be ignored if there is a `text_config`
        same = config.vision_config.out_hidden_size == config.text_config.hidden_size
        _check(same, "out_hidden_size of the tower differs from hidden_size of the language model")
        return config

    def as_written(self) -> dict[str, Any]:
        """Convert this config back to the contents of a `config.json`, without special token IDs."""

        def as_json(entries: list[tuple[str, Any]]) -> dict[str, Any]:
            content = {name: value for name, value in entries if value is not None}
            return content | {name: list(value) for name, value in content.items() if isinstance(value, tuple)}

        content = asdict(self, dict_factory=as_json)
        vision = content["vision_config"]
        text = content["text_config"]
        family = vision.pop("family")
        del text["head_norms"]
        text |= text.pop("delta_net", {}) | text.pop("experts", {}) | text.pop("qwen4", {})
        if FAMILIES[family].embed_dim:
            wide = vision["hidden_size"]
            vision |= {"embed_dim": wide, "hidden_size": vision["out_hidden_size"]}
            vision["mlp_ratio"] = vision["intermediate_size"] // wide
        text["rope_parameters"] = {"rope_type": "default"} | text["rope_parameters"]
        if self.text_config.delta_net or not FAMILIES[family].native:
            text["model_type"] = f"{family}_text"
            vision["model_type"] = f"{family}_vision"
        return {"model_type": family, **content}


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling settings from a `generation_config.json`. Missing settings are None."""

    eos_token_id: EndIds = None
    do_sample: Annotated[bool | None, YES_OR_NO] = None
    temperature: Annotated[float | None, Rule.number(0, 1e6)] = None
    top_k: Annotated[int | None, Rule.whole(0, 2**31)] = None
    top_p: Annotated[float | None, Rule.number(0, 1)] = None
    repetition_penalty: Annotated[float | None, Rule.number(1e-3, 1e3)] = None


class Unsupported(ValueError):
    """Raised if a config is valid, but evoprune doesn't support the model."""


def _check_misplaced_sizes(content: dict, family: str) -> None:
    """Raise ValueError if a config has a `text_config`, but specifies a language model size only at the top level.

    transformers would ignore a size at the top level and use the default, so the weight shapes wouldn't match. The context length
    is exempt, because it doesn't affect the weights.
    """
    inner = section(content, "text_config")
    if not inner:
        return
    classes = (TextConfig, DeltaNet, Experts, Qwen4)
    defaults = {field.name: field.default for cls in classes for field in fields(cls)} | dict(FAMILIES[family].text)
    defaults["num_key_value_heads"] = inner.get("num_attention_heads")
    for name in defaults.keys() - {"eos_token_id", "max_position_embeddings"}:
        outer = content.get(name)
        misplaced = type(outer) is int and inner.get(name) is None and outer != defaults[name]
        _check(not misplaced, f"{name} is next to text_config instead of inside it")


def _parse_text(content: dict, family: str) -> TextConfig:
    """Parse the language model settings. Raises the same errors as `Config.parse`."""
    traits = FAMILIES[family]
    given = {name: value for name, value in content.items() if value is not None}
    if "num_local_experts" in given:  # transformers saves `num_experts` using this name
        given = {"num_experts": given["num_local_experts"]} | given
    given = traits.text | given
    # As in transformers, the older name takes precedence, because YaRN guides tell users to add it to files that already contain
    # the newer name.
    rope = section(content, "rope_scaling") or section(content, "rope_parameters")
    names = {"rope_theta", "mrope_section", "partial_rotary_factor"} & traits.text.keys()
    rope = {name: given[name] for name in sorted(names)} | {
        name: value for name, value in rope.items() if value is not None
    }
    heads = given.get("num_key_value_heads", given.get("num_attention_heads"))
    rope.pop("mrope_interleaved", None)  # transformers ignores it
    if traits.head_norms:
        rope["mrope_interleaved"] = True
        _check(not content.get("attention_bias"), "attention_bias is not supported", Unsupported)
    for name in UNSUPPORTED:
        _check(content.get(name) is None, f"{name} is not supported", Unsupported)
    _check(content.get("is_causal", True) is True, "a language model that is not causal is not supported", Unsupported)
    if "shared_expert_intermediate_size" in traits.text:
        given.pop("intermediate_size", None)  # every layer has experts
    text = pick(TextConfig, given | {"rope_parameters": rope, "num_key_value_heads": heads}, "text_config")
    if "full_attention_interval" in traits.text:
        text = replace(text, delta_net=_parse_delta_net(given, text.num_hidden_layers))
    if "num_experts" in traits.text:
        text = replace(text, experts=_parse_experts(given, traits.text.keys(), family))
    if "hc_count" in traits.text:
        given.setdefault("ple_embed_dim", text.hidden_size)
        text = replace(text, qwen4=pick(Qwen4, given, "text_config"))
        _check(not text.reads_ids or text.eos_token_id not in (None, ()), "text_config has no eos_token_id")
    if (
        text.delta_net is None
        or text.qwen4
        or text.mtp_num_hidden_layers > 1
        or given.get("mtp_use_dedicated_embeddings")
    ):
        text = replace(text, mtp_num_hidden_layers=0)
    every = all(map(text.has_experts, range(text.num_hidden_layers)))
    _check(every or text.intermediate_size is not None, "text_config has no intermediate_size")
    _check_rope(rope)
    if traits.answer_windows:
        text = replace(text, sliding_window=_answer_window(content, text.max_position_embeddings))
    elif text.delta_net is None:
        windows = _attends_over_windows(content, text)
        _check(not windows, "sliding window attention is not supported", Unsupported)
    act = text.hidden_act
    _check(act == "silu", f"activation {act} is not supported, only silu", Unsupported)
    divides = text.hidden_size % (2 * text.num_attention_heads) == 0
    if traits.head_norms:
        divides = divides or text.head_dim is not None
    else:
        divides = divides and text.head_dim in (None, text.hidden_size // text.num_attention_heads)
    _check(divides, "hidden_size does not fit the number of heads")
    _check(
        text.num_attention_heads % text.num_key_value_heads == 0,
        "num_key_value_heads does not divide num_attention_heads",
    )
    sections = Rule.list_of(Rule.whole(0, 2**16), 3).check(rope["mrope_section"], "mrope_section")
    share = 1
    if text.delta_net:
        share = Rule.number(0, 1).check(rope.get("partial_rotary_factor", 1), "partial_rotary_factor")
    _check(2 * sum(sections) == int(head_size(text) * share), "mrope_section does not fit the heads")
    Rule.number(1e-6, 1e15).check(rope["rope_theta"], "rope_theta")
    if text.qwen4:
        linear = [text.is_linear(layer) for layer in range(text.num_hidden_layers)]
        problem = text.qwen4.problem(linear, 2 * sum(sections))
        _check(problem is None, f"text_config: {problem}")
    return replace(text, head_norms=traits.head_norms, use_sliding_window=False)


def _attends_over_windows(content: dict, text: TextConfig) -> bool:
    """Return True if any layer of a Qwen2-VL or Qwen2.5-VL language model would use sliding-window attention in transformers."""
    if not text.use_sliding_window or content.get("sliding_window", True) is None:
        return False
    if content.get("layer_types") is not None:
        return "sliding_attention" in Rule.list_of(TEXT).check(content["layer_types"], "text_config.layer_types")
    full = Rule.whole(0, 2**31).check(content.get("max_window_layers", 80), "text_config.max_window_layers")
    return full < text.num_hidden_layers


def _answer_window(content: dict, context: int | None) -> int | None:
    """Return the `TextConfig.sliding_window` of a Qwen3-VL model. Raises the same errors as `Config.parse`.

    The layers of these models have no windows, but transformers derives the type of the KV cache from these settings.

    Args:
        content: The language model settings.
        context: The context length, or None if it is unknown.
    """
    if content.get("layer_types") is not None:
        kinds = Rule.list_of(TEXT).check(content["layer_types"], "text_config.layer_types")
        _check({*kinds} <= {FULL}, "layers without full attention are not supported", Unsupported)
        return None
    _check(content.get("attention_chunk_size") is None, "attention_chunk_size is not supported", Unsupported)
    window = content.get("sliding_window")
    if window is None:
        return None
    Rule.whole(2, 2**31).check(window, "text_config.sliding_window")
    return window if context is None or window < context else None


def _parse_delta_net(given: dict, depth: int) -> DeltaNet:
    """Parse the Gated DeltaNet settings of a language model with `depth` layers. Raises the same errors as `Config.parse`."""
    interval = Rule.whole(1, 1000).check(given["full_attention_interval"], "text_config.full_attention_interval")
    kinds = [LINEAR] * depth
    for layer in range(interval - 1, depth, interval):
        kinds[layer] = FULL
    net = pick(DeltaNet, {"layer_types": kinds} | given, "text_config")
    if "hc_count" in given:
        net = replace(net, layer_types=tuple(FULL if kind in INDEXED else kind for kind in net.layer_types))
    _check(len(net.layer_types) == depth, f"layer_types has {len(net.layer_types)} entries for {depth} layers")
    for kind in net.layer_types:
        _check(kind in (FULL, LINEAR), f"a layer of type {kind[:100]!r} is not supported", Unsupported)
    _check(FULL in net.layer_types, "a language model without attention layers is not supported", Unsupported)
    whole_groups = net.linear_num_value_heads % net.linear_num_key_heads == 0
    _check(whole_groups, "linear_num_key_heads does not divide linear_num_value_heads")
    _check(
        given.get("attn_output_gate", True) is True, "attention without an output gate is not supported", Unsupported
    )
    gate = given.get("output_gate_type", "swish")
    _check(
        gate in ("swish", "silu") or "hc_count" in given,
        f"output_gate_type {gate!r} is not supported, only swish",
        Unsupported,
    )
    return net


def _parse_experts(given: dict, known: Collection[str], family: str) -> Experts:
    """Parse the settings of a mixture-of-experts (MoE) model. Raises the same errors as `Config.parse`.

    Args:
        given: The language model settings.
        known: Names of all settings supported by this model family.
        family: One of `FAMILIES`.
    """
    experts = pick(Experts, given, "text_config")
    active = experts.num_experts_per_tok
    count = experts.num_experts
    _check(active <= count, f"num_experts_per_tok is {active}, but there are {count} experts")
    _check(given.get("norm_topk_prob", True) is True, "norm_topk_prob false is not supported", Unsupported)
    # In transformers, each family supports either layers without experts or a shared expert, but not both
    shared = "shared_expert_intermediate_size"
    unread = {"decoder_sparse_step", "mlp_only_layers"} if shared in known else {shared}
    for field in fields(Experts):
        value = getattr(experts, field.name)
        same = field.name not in unread or value == field.default
        _check(same, f"{field.name} {value} is not supported in {family}", Unsupported)
    return experts


def _check_rope(rope: dict, kinds: Collection[str] = ("default", "mrope")) -> None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    problem = f"rope_type {reprlib.repr(kind)} is not supported, only Qwen's own"
    _check(kind in kinds, problem, Unsupported)
    nested = any(isinstance(value, dict) for value in rope.values())
    _check(not nested, "rotary embeddings that differ between layers are not supported", Unsupported)


def head_size(text) -> int:
    """Return the number of features per attention head. `text` is a `TextConfig` or a transformers text config."""
    return getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads


def _parse_vision(content: dict, family: str) -> VisionConfig:
    """Parse a model's `vision_config`. Supports all families in `FAMILIES`.

    Raises:
        ValueError: If a numeric setting is missing or not a number.
    """
    traits = FAMILIES[family]
    given = {"in_channels": content.get("in_chans", 3), "hidden_act": traits.hidden_act} | traits.vision
    given |= {name: value for name, value in content.items() if value is not None}
    if traits.embed_dim:
        own = pick(Qwen2Sizes, given, "vision_config")
        given |= {"hidden_size": own.embed_dim, "out_hidden_size": own.hidden_size}
        given["intermediate_size"] = own.embed_dim * own.mlp_ratio
    given |= {
        name: None for name in ("num_position_embeddings", "deepstack_visual_indexes") if name not in traits.vision
    }
    rope = section(given, "rope_parameters")
    _check_rope(rope, ("default", "axial"))
    speed = rope.get("rope_theta") or 10_000
    _check(speed == 10_000, f"rope_theta {reprlib.repr(speed)} of the tower is not supported, only 10000", Unsupported)
    if traits.windows:
        return _with_whole_heads(replace(pick(VisionConfig, given, "vision_config"), family=family), given)
    picked = pick(VisionConfig, given | {"fullatt_block_indexes": [], "window_size": None}, "vision_config")
    # No layer uses window attention, so any value works
    window = 4 * picked.patch_size * picked.spatial_merge_size
    every = tuple(range(picked.depth))
    picked = replace(picked, fullatt_block_indexes=every, window_size=window, tokens_per_second=None, family=family)
    return _with_whole_heads(picked, given)


def _with_whole_heads(config: VisionConfig, given: dict) -> VisionConfig:
    """Return the config, after checking that its rotary embedding covers whole heads."""
    wide = given.get("head_dim", config.hidden_size // config.num_heads)
    _check(wide == config.hidden_size // config.num_heads, "head_dim of the tower does not fit its number of heads")
    return config


def _check(holds: bool, problem: str, error: type[ValueError] = ValueError) -> None:
    if not holds:
        raise error(problem)
