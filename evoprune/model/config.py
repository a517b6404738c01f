"""The content of a `config.json` of Qwen2.5-VL or Qwen2-VL, under Hugging Face's names. Needs neither torch nor transformers.

Published checkpoints keep the language model's numbers at the top level, newer ones in `text_config`; both are read. A model
that this program could not run faithfully is refused here, before any weights are read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from evoprune.model.rules import OBJECT, TEXT, YES_OR_NO, either, list_of, number, pick, section, whole

Layers = Annotated[int, whole(1, 1000)]  # far more than any model has, and still built in a second
Size = Annotated[int, whole(1, 2**22)]
Tokens = Annotated[int, whole(1, 2**24)]
Text = Annotated[str, TEXT]
YesOrNo = Annotated[bool, YES_OR_NO]
TOKEN_ID = whole(0, 2**31)
END_IDS = either(TOKEN_ID, list_of(TOKEN_ID))  # of the tokens that end an answer
ROPE_THETA, MROPE_SECTION = number(1e-6, 1e15), list_of(whole(0, 2**16), 3)

QWEN2_5, QWEN2 = "qwen2_5_vl", "qwen2_vl"
MODEL_TYPES = (QWEN2_5, QWEN2)
PATCHES = 4  # of a unit: 2x2
ANSWER_COLUMNS = 256  # that a prompt's KV cache has to spare: an answer of the usual length needs no second cache
ACTIVATIONS = {QWEN2_5: "silu", QWEN2: "quick_gelu"}  # of the tower


@dataclass(frozen=True)
class VisionConfig:
    """The vision tower of either family.

    Attributes:
        hidden_size, intermediate_size: features of a patch in the tower and inside its MLPs.
        out_hidden_size: features of a unit after the merger: the language model's hidden size.
        fullatt_block_indexes: layers that attend over whole frame pairs, not windows; in Qwen2-VL all of them.
        window_size: side of an attention window in pixels. Where no layer attends over windows it only sets the order of rows.
        patch_size: side of a patch in pixels; `temporal_patch_size`: frames in a frame pair.
        spatial_merge_size: side of a unit in patches.
        tokens_per_second: time positions of M-RoPE per second; None if M-RoPE counts frame pairs.
        family: one of `MODEL_TYPES`; it decides how the layers are built (`vision.families`).
    """

    depth: Layers
    hidden_size: Size
    intermediate_size: Size
    num_heads: Size
    out_hidden_size: Size
    fullatt_block_indexes: Annotated[tuple[int, ...], list_of(whole(0, 1000))]
    window_size: Size = 112
    patch_size: Size = 14
    temporal_patch_size: Size = 2
    spatial_merge_size: Size = 2
    in_channels: Size = 3
    tokens_per_second: Annotated[int | float | None, number(1e-3, 1e6)] = 4
    hidden_act: Text = "silu"
    family: str = QWEN2_5

    @property
    def mlp_matrices(self) -> int:
        """Number of hidden x intermediate matrices in a layer's MLP: a gated one has three."""
        return 3 if self.family == QWEN2_5 else 2


@dataclass(frozen=True)
class Qwen2VisionConfig:
    """The vision tower as Qwen2-VL's files describe it: `embed_dim` is the tower's size, `hidden_size` the language model's."""

    depth: Layers
    embed_dim: Size
    hidden_size: Size
    num_heads: Size
    mlp_ratio: Annotated[int, whole(1, 1000)] = 4
    patch_size: Size = 14
    temporal_patch_size: Size = 2
    spatial_merge_size: Size = 2
    in_channels: Size = 3
    hidden_act: Text = "quick_gelu"


@dataclass(frozen=True)
class TextConfig:
    """The language model.

    `rope_parameters` holds `rope_theta` and `mrope_section`. `max_position_embeddings` is the length of its context: how many
    tokens it reads and writes together; None if the file does not say.
    """

    vocab_size: Tokens
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Size
    num_key_value_heads: Size
    rope_parameters: Annotated[dict[str, Any], OBJECT]
    rms_norm_eps: Annotated[float, number(1e-30, 1)] = 1e-5
    hidden_act: Text = "silu"
    use_sliding_window: YesOrNo = False
    eos_token_id: Annotated[int | tuple[int, ...] | None, END_IDS] = None
    max_position_embeddings: Annotated[int | None, whole(1, 2**31)] = None


@dataclass(frozen=True)
class Config:
    """Vision tower and language model, and whether input and output embeddings share one matrix."""

    vision_config: VisionConfig
    text_config: TextConfig
    tie_word_embeddings: bool = False


def parse_config(content: dict) -> Config:
    """Reads the content of a `config.json`.

    Raises ValueError: a number is missing or out of range, or this program cannot run the model.
    """
    text, vision = section(content, "text_config") or content, section(content, "vision_config")
    rope = dict(section(text, "rope_parameters") or section(text, "rope_scaling"))
    rope.setdefault("rope_theta", text.get("rope_theta", 1e6))
    rope.setdefault("mrope_section", [16, 24, 24])
    heads = text.get("num_attention_heads")
    text = text | {"rope_parameters": rope, "num_key_value_heads": text.get("num_key_value_heads") or heads}
    tied = content.get("tie_word_embeddings", text.get("tie_word_embeddings"))
    tied = YES_OR_NO.check(False if tied is None else tied, "tie_word_embeddings")
    family = content.get("model_type", QWEN2_5)
    config = Config(parse_vision(vision, family), pick(TextConfig, text, "text_config"), tied)
    check_vision(config.vision_config)
    _check_text(config.text_config)
    same = config.vision_config.out_hidden_size == config.text_config.hidden_size
    _check(same, "tower and language model differ in size")
    return config


def _check_text(t: TextConfig) -> None:
    """Raises ValueError if this program cannot run the language model faithfully."""
    rope = t.rope_parameters
    kind = rope.get("rope_type", rope.get("type", "default"))
    _check(kind in ("default", "mrope"), f"rope_type {kind!r} is not supported, only Qwen's own")
    _check(not t.use_sliding_window, "sliding window attention is not supported")
    _check(t.hidden_act == "silu", f"activation {t.hidden_act} is not supported, only silu")
    _check(t.hidden_size % (2 * t.num_attention_heads) == 0, "hidden_size does not divide into heads")
    _check(t.num_attention_heads % t.num_key_value_heads == 0, "key/value heads do not divide the heads")
    section = MROPE_SECTION.check(rope["mrope_section"], "mrope_section")
    _check(2 * sum(section) == t.hidden_size // t.num_attention_heads, "mrope_section does not fit the heads")
    ROPE_THETA.check(rope["rope_theta"], "rope_theta")


def parse_vision(content: dict, family: str) -> VisionConfig:
    """Reads the `vision_config` of a model.

    Args:
        content: as in the file.
        family: one of `MODEL_TYPES`; in Qwen2-VL's files names differ, and some numbers are constants.

    Raises ValueError: a number is missing, or is not one.
    """
    content = {"in_channels": content.get("in_chans", 3)} | content
    if family != QWEN2:
        return pick(VisionConfig, content, "vision_config")
    sizes = pick(Qwen2VisionConfig, content, "vision_config")
    return VisionConfig(
        depth=sizes.depth,
        hidden_size=sizes.embed_dim,
        intermediate_size=sizes.embed_dim * sizes.mlp_ratio,
        num_heads=sizes.num_heads,
        out_hidden_size=sizes.hidden_size,
        fullatt_block_indexes=tuple(range(sizes.depth)),
        window_size=4 * sizes.patch_size * sizes.spatial_merge_size,  # of no effect: no layer attends over windows
        patch_size=sizes.patch_size,
        temporal_patch_size=sizes.temporal_patch_size,
        spatial_merge_size=sizes.spatial_merge_size,
        in_channels=sizes.in_channels,
        tokens_per_second=None,
        hidden_act=sizes.hidden_act,
        family=QWEN2,
    )


def vision_sizes(config) -> VisionConfig:
    """The config of a tower, from ours or that of transformers. Raises ValueError as `parse_vision`."""
    if isinstance(config, VisionConfig):
        return config
    return parse_vision(vars(config), config.model_type.removesuffix("_vision"))


def check_vision(v: VisionConfig) -> None:
    """Raises ValueError if this program cannot run the tower faithfully."""
    act = ACTIVATIONS[v.family]
    _check(v.hidden_act == act, f"activation {v.hidden_act} of the tower is not supported, only {act}")
    for name, only in (("spatial_merge_size", 2), ("temporal_patch_size", 2), ("in_channels", 3)):
        _check(getattr(v, name) == only, f"{name} {getattr(v, name)} is not supported, only {only}")
    _check(v.hidden_size % (4 * v.num_heads) == 0, "the tower's hidden_size does not divide into heads")
    _check(v.window_size % (v.patch_size * v.spatial_merge_size) == 0, "window_size is no whole number of units")
    layers = all(0 <= i < v.depth for i in v.fullatt_block_indexes)
    _check(layers, "fullatt_block_indexes names layers that are not there")


def _check(holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(problem)


def kv_bytes(config: Config, tokens: int | Sequence[int], bytes_each: int = 2) -> int:
    """Bytes of the language model's keys and values for a prompt.

    Args:
        tokens: of the prompt, in each layer or in all.
        bytes_each: of a number; 2 for bf16.
    """
    text = config.text_config
    head = text.hidden_size // text.num_attention_heads
    every = text.num_hidden_layers * tokens if isinstance(tokens, int) else sum(tokens)
    return 2 * text.num_key_value_heads * head * every * bytes_each
