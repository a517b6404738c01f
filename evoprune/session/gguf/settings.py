"""Convert the metadata of GGUF files to the small files of a Hugging Face model folder. Does not import torch.

The metadata of llama.cpp's and Ollama's converters differs only in the names of some entries. What GGUF files cannot hold comes
from the model's family (`FAMILIES`), and `GgufSettings.assumed` names it.
"""

import re
import struct
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from evoprune.model import FAMILIES, Unsupported
from evoprune.session.gguf.reader import Header, TensorInfo
from evoprune.session.gguf.templates import INPUTS, template_of
from evoprune.untrusted import TEXT, Rule
from evoprune.video import InputLimits

# The model types of each text architecture, by the type of the projector, or None for a single file with both parts.
ARCHITECTURES: dict[str, dict[str | None, str]] = {}
for _name, _traits in FAMILIES.items():
    _single = _name.replace("_", "")
    if "ngram_size" in _traits.text:  # the n-grams of Qwen4-Exp are not supported
        continue
    if _traits.head_norms:
        ARCHITECTURES[_single] = {"qwen3vl_merger": _name, None: _name}
    elif _traits.embed_dim:
        ARCHITECTURES.setdefault("qwen2vl", {})["qwen2vl_merger"] = _name
    else:  # pairs have the architecture of Qwen2-VL
        ARCHITECTURES.setdefault("qwen2vl", {})["qwen2.5vl_merger"] = _name
        ARCHITECTURES[_single] = {None: _name}
PROJECTOR = "clip"  # the architecture of a projector file
SIZE = Rule.whole(1, 2**24)
COUNT = Rule.whole(0, 2**24)
SIZES = Rule.list_of(COUNT)
NUMBER = Rule.number(0, 1e15)
NUMBERS = Rule.list_of(Rule.number(-1e6, 1e6), 3)
ID = Rule.whole(0, 2**31)
WINDOW = 112  # size of the tower's attention windows in pixels, in all published Qwen2.5-VL models
WINDOW_PATTERN = 8  # every eighth layer of the tower has full attention, in all published Qwen2.5-VL models
POSITIONS_PER_SECOND = 2  # temporal positions per second in all published Qwen2.5-VL models
# Types of tokens in a vocabulary.
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4
# How text is split into words, by the name that GGUF files use.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[LETTERS]+|\p{N}| ?[^\sLETTERS\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = {name: _WORDS.replace("LETTERS", letters) for name, letters in (("qwen2", r"\p{L}"), ("qwen35", r"\p{L}\p{M}"))}
# llama.cpp's converter takes all tokens between <| and |> for special tokens. In Qwen's tokenizers, these are not.
NOT_SPECIAL = re.compile(r"<\|(fim_\w+|repo_name|file_sep)\|>")
ENDS = "<|im_end|>", "<|endoftext|>"  # tokens that end an answer in all families
# Entries of config.json for the IDs of special tokens.
SPECIAL = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# Entries of generation_config.json, with the values that they may have.
SAMPLING = {
    "temp": ("temperature", NUMBER),
    "top_k": ("top_k", COUNT),
    "top_p": ("top_p", Rule.number(0, 1)),
    "penalty_repeat": ("repetition_penalty", NUMBER),
}
DTYPES = {"F32": "float32", "BF16": "bfloat16"}  # all other types are dequantized to float16
LAYER = re.compile(r"blk\.(\d+)\.(.+)")
DEEPSTACK = re.compile(r"v\.deepstack(_merger)?\.(\d+)\.")


class GgufSettings:
    """The settings and the tensors of a model in GGUF files.

    Args:
        headers: The headers of the text file (or of all its parts, in order), and of the projector if it is a separate file.

    Raises:
        ValueError: If the files do not fit together, or a tensor appears twice.
        Unsupported: If evoprune does not run this model.
    """

    def __init__(self, headers: Sequence[Header]):
        self.headers = headers
        self.tensors: dict[str, TensorInfo] = {}
        for header in headers:
            if twice := sorted(self.tensors.keys() & header.tensors.keys()):
                raise ValueError(f"the tensor {twice[0]} is in two files")
            self.tensors |= header.tensors
        self.assumed: list[str] = []  # settings that the files do not contain
        self.architecture = self.get("general.architecture", TEXT)
        if self.architecture not in ARCHITECTURES:
            raise Unsupported(f"its architecture is {str(self.architecture)[:40]!r}")
        if not any(name.startswith("v.") for name in self.tensors):
            raise ValueError("it has no vision tower")
        names = "clip.projector_type", "clip.vision.projector_type"
        self.projector = next((found for name in names if (found := self.get(name, TEXT, None))), None)
        families = ARCHITECTURES[self.architecture]
        if self.projector not in families:
            raise ValueError(f"its projector has the type {str(self.projector)[:40]}, which belongs to another model")
        self.model_type = families[self.projector]
        self.traits = FAMILIES[self.model_type]
        if bool(self.deepstack) != ("deepstack_visual_indexes" in self.traits.vision):
            raise ValueError("its projector belongs to another model")

    def get(self, name: str, rule: Rule, *default: Any) -> Any:
        """Return a metadata entry that satisfies `rule`, from the first file that contains it.

        Raises:
            ValueError: If the entry is invalid, or missing and there is no `default`.
        """
        for header in self.headers:
            if header.fields.get(name) is not None:
                return rule.check(header.fields[name], name)
        if not default:
            raise ValueError(f"its metadata has no {name}")
        return default[0]

    def text(self, name: str, rule: Rule = SIZE, *default: Any) -> Any:
        return self.get(f"{self.architecture}.{name}", rule, *default)

    def vision(self, name: str, rule: Rule = SIZE, *default: Any) -> Any:
        """Return an entry about the tower, which llama.cpp and Ollama store under different names."""
        names = f"clip.vision.{name}", f"{self.architecture}.vision.{name}"
        found = next((value for each in names if (value := self.get(each, rule, None)) is not None), None)
        return self.get(names[0], rule, *default) if found is None else found

    def rows(self, *names: str) -> int:
        """Return the number of rows of the first of these tensors that exists."""
        return self._first(*names).shape[0]

    def _first(self, *names: str) -> TensorInfo:
        found = next((self.tensors[name] for name in names if name in self.tensors), None)
        if found is None:
            raise ValueError(f"the tensor {names[0]} is missing")
        return found

    def assume(self, setting: str) -> None:
        if setting not in self.assumed:
            self.assumed.append(setting)

    @cached_property
    def depth(self) -> int:
        """Number of layers of the language model, without those for multi-token prediction."""
        depth = self.text("block_count") - self.text("nextn_predict_layers", COUNT, 0)
        return Rule.whole(1, 1000).check(depth, "the number of layers")

    @cached_property
    def linear(self) -> tuple[bool, ...]:
        """Whether each layer of the language model is a Gated DeltaNet.

        This is decided by the tensors, because `full_attention_interval` may be a default that the converter wrote.
        """
        return tuple(f"blk.{layer}.ssm_a" in self.tensors for layer in range(self.depth))

    @cached_property
    def deepstack(self) -> list[tuple[int, str]]:
        """The tower layer and the prefix of the tensors of each DeepStack merger, in order."""
        found = {(int(m[2]), m[1] or "") for name in self.tensors if (m := DEEPSTACK.match(name))}
        if any(merger for _, merger in found):  # Ollama numbers the mergers instead of the layers
            layers = self.vision("deepstack_visual_indexes", SIZES)
            if sorted(found) != [(number, "_merger") for number in range(len(layers))]:
                raise ValueError("its DeepStack mergers do not match deepstack_visual_indexes")
            return [(layer, f"v.deepstack_merger.{number}") for number, layer in enumerate(layers)]
        return [(layer, f"v.deepstack.{layer}") for layer, _ in sorted(found)]

    @cached_property
    def tower_width(self) -> int:
        return self.vision("embedding_length")

    def check_sizes(self) -> None:
        """Raise ValueError if the projector does not fit the language model."""
        self._vision_config(self.text("embedding_length"))

    def small_files(self) -> dict[str, dict | str]:
        """Return the contents of the small files in the model folder: JSON objects, and the chat template as text.

        Raises:
            ValueError: If metadata is missing or invalid.
            Unsupported: If evoprune does not support the tokenizer.
        """
        if missing := [token for token in SPECIAL.values() if token not in self._token_ids]:
            raise ValueError(f"its vocabulary has no {missing[0]}")
        tokens = {name: self._token_ids[token] for name, token in SPECIAL.items()}
        return {
            "config.json": self.config() | tokens,
            "tokenizer.json": self._tokenizer(),
            "tokenizer_config.json": self._named_tokens(),
            "generation_config.json": self._generation(),
            "preprocessor_config.json": self._processor(),
            "chat_template.jinja": self._template(),
        }

    def config(self) -> dict[str, Any]:
        """Return the contents of config.json, without the IDs of special tokens. For the exceptions, see `small_files`."""
        text = self._text_config()
        return {
            "model_type": self.model_type,
            "architectures": [f"{self.traits.model}ForConditionalGeneration"],
            "text_config": text,
            "vision_config": self._vision_config(text["hidden_size"]),
            "tie_word_embeddings": "output.weight" not in self.tensors,
            "dtype": self._dtype,
        }

    @property
    def _dtype(self) -> str:
        """The dtype of the text file's matrices, or of their dequantized form."""
        sizes: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            if LAYER.match(name) and len(tensor.shape) > 1:
                sizes[tensor.kind.name] = sizes.get(tensor.kind.name, 0) + tensor.size
        return DTYPES.get(max(sizes, key=sizes.__getitem__, default="F16"), "float16")

    def _text_config(self) -> dict[str, Any]:
        heads = self.text("attention.head_count", SIZE | SIZES)
        keys = self.text(
            "attention.head_count_kv", SIZE | SIZES, heads
        )  # Ollama has a list, with 0 for DeltaNet layers
        heads, keys = (max(each, default=0) if isinstance(each, tuple) else each for each in (heads, keys))
        wide = self.text("embedding_length")
        head = self.text("attention.key_length", SIZE, None)
        width, vocabulary = reversed(self._first("token_embd.weight").shape[:2])
        if width != wide:
            raise ValueError("the sizes of its tensors do not match its metadata")
        text = {
            "vocab_size": vocabulary,
            "hidden_size": wide,
            "intermediate_size": self.text("feed_forward_length", SIZE | SIZES, None),
            "num_hidden_layers": self.depth,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "head_dim": head if self.traits.head_norms else None,
            "rms_norm_eps": shortest(self.text("attention.layer_norm_rms_epsilon", NUMBER)),
            "max_position_embeddings": self.text("context_length", SIZE, None),
            "eos_token_id": self.get("tokenizer.ggml.eos_token_id", ID, None),
            "rope_parameters": self._rope(head or wide // max(1, heads)),
        }
        if isinstance(text["intermediate_size"], tuple):
            text["intermediate_size"] = max(text["intermediate_size"], default=0)
        if "full_attention_interval" in self.traits.text:
            text |= self._delta_net()
        if "num_experts" in self.traits.text:
            text |= self._experts()
        return {name: value for name, value in text.items() if value is not None}

    def _rope(self, head: int) -> dict[str, Any]:
        names = "rope.dimension_sections", "rope.mrope_section", "mrope_sections"
        sections = next((found for name in names if (found := self.text(name, SIZES, None))), None)
        if sections is None:
            sections = self.traits.text["mrope_section"]  # some of Ollama's files omit it
            self.assume(f"mrope_section {listed_numbers(sections)}")
        kind = self.text("rope.scaling.type", TEXT, "none")
        rope = {
            "rope_type": "default" if kind == "none" else kind,
            "rope_theta": shortest(self.text("rope.freq_base", NUMBER)),
            "mrope_section": list(sections[:3]),
        }
        if "partial_rotary_factor" in self.traits.text:
            rope["partial_rotary_factor"] = self.text("rope.dimension_count") / max(1, head)
        return rope

    def _delta_net(self) -> dict[str, Any]:
        values = self.text("ssm.time_step_rank")
        return {
            "layer_types": ["linear_attention" if linear else "full_attention" for linear in self.linear],
            "linear_conv_kernel_dim": self.text("ssm.conv_kernel"),
            "linear_key_head_dim": self.text("ssm.state_size"),
            "linear_num_key_heads": self.text("ssm.group_count"),
            "linear_num_value_heads": values,
            "linear_value_head_dim": self.text("ssm.inner_size") // values,
            "mtp_num_hidden_layers": self.text("nextn_predict_layers", COUNT, 0),
        }

    def _experts(self) -> dict[str, Any]:
        experts = {
            "num_experts": self.text("expert_count"),
            "num_experts_per_tok": self.text("expert_used_count"),
            "moe_intermediate_size": self.text("expert_feed_forward_length"),
        }
        if "shared_expert_intermediate_size" in self.traits.text:
            return experts | {"shared_expert_intermediate_size": self.text("expert_shared_feed_forward_length")}
        dense = [layer for layer in range(self.depth) if f"blk.{layer}.ffn_gate.weight" in self.tensors]
        return experts | {"mlp_only_layers": dense}

    def _vision_config(self, text_width: int) -> dict[str, Any]:
        wide = self.tower_width
        # Old files of Qwen2-VL state a size of 0, and swap the two matrices.
        inner = max(self._first("v.blk.0.ffn_up.weight", "v.blk.0.mlp.linear_fc1.weight").shape)
        vision = {
            "depth": self.vision("block_count"),
            "hidden_size": wide,
            "intermediate_size": inner,
            "num_heads": self.vision("attention.head_count"),
            "out_hidden_size": text_width,
            "patch_size": self.vision("patch_size"),
            "spatial_merge_size": self.vision("spatial_merge_size", SIZE, 2),
            "temporal_patch_size": self.vision("temporal_patch_size", SIZE, 2),
        }
        out = self.rows("mm.2.weight", "v.merger.mlp.2.weight", "v.merger.linear_fc2.weight")
        if out != text_width or self.vision("projection_dim", COUNT, text_width) not in (0, text_width):
            raise ValueError(f"its projector has {out:,} features, but the language model has {text_width:,}")
        if self.traits.windows:
            vision |= self._windows(vision["depth"])
        elif self.traits.embed_dim:
            vision |= {"embed_dim": wide, "hidden_size": text_width, "mlp_ratio": inner // wide}
        else:
            vision["num_position_embeddings"] = self.rows("v.position_embd.weight", "v.pos_embed.weight")
        if self.deepstack:
            vision["deepstack_visual_indexes"] = [layer for layer, _ in self.deepstack]
        return vision

    def _windows(self, depth: int) -> dict[str, Any]:
        full = self.vision("fullatt_block_indexes", SIZES, None)
        if full is None:
            every = self.vision("n_wa_pattern", SIZE, None)
            if every is None:
                every = WINDOW_PATTERN
                self.assume(f"full attention in every {every}th layer of the tower")
            full = range(every - 1, min(depth, 1000), every)
        window = self.vision("window_size", SIZE, None)
        if window is None:
            window = WINDOW
            self.assume(f"window_size {window}")
        self.assume(f"tokens_per_second {POSITIONS_PER_SECOND}")
        return {
            "fullatt_block_indexes": list(full),
            "window_size": window,
            "tokens_per_second": POSITIONS_PER_SECOND,
        }

    def _processor(self) -> dict[str, Any]:
        """Return the settings of the image processor. Only the mean and the standard deviation also apply to videos."""
        usual = self.traits.picture
        settings: dict[str, Any] = {}
        for name in ("image_mean", "image_std"):
            found = self.vision(name, NUMBERS, None)
            normal = usual.get(name) or getattr(InputLimits, name)
            if found is not None and struct.pack("3f", *found) != struct.pack("3f", *normal):
                settings[name] = list(map(shortest, found))
        for name, others in (
            ("min_pixels", ("image_min_pixels", "shortest_edge")),
            ("max_pixels", ("image_max_pixels", "longest_edge")),
        ):
            found = next((value for other in others if (value := self.vision(other, SIZE, None))), None)
            settings[name] = found or usual[name]
            if found is None:
                self.assume(f"{name} {usual[name]:,} of images")
        self.assume("frame rate and pixel limits of videos")
        return settings

    # --- tokenizer, chat template, and generation settings ---

    @cached_property
    def _tokens(self) -> tuple[str, ...]:
        return self._list("tokenizer.ggml.tokens", str)

    def _list(self, name: str, kind: type) -> tuple:
        """Return a list that may be longer than `Rule.list_of` allows."""
        rule = Rule(f"a list of {kind.__name__} values", lambda v: isinstance(v, list) and set(map(type, v)) <= {kind})
        return self.get(name, rule)

    @cached_property
    def _token_ids(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self._tokens)}

    def _tokenizer(self) -> dict[str, Any]:
        tokens = self._tokens
        kinds = self._list("tokenizer.ggml.token_type", int)
        if len(kinds) != len(tokens):
            raise ValueError(f"it has {len(tokens):,} tokens, but {len(kinds):,} token types")
        model = self.get("tokenizer.ggml.model", TEXT)
        words = self.get("tokenizer.ggml.pre", TEXT, "")
        if model != "gpt2" or words not in WORDS:
            raise Unsupported(f"its tokenizer is {model[:40]} {words[:40]}, not gpt2 with {' or '.join(WORDS)}")
        added = [
            {
                "id": i,
                "content": token,
                "special": kind == CONTROL and not NOT_SPECIAL.fullmatch(token),
                **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
            }
            for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
            if kind in (CONTROL, USER_DEFINED)
        ]
        merges = [merge.split(" ") for merge in self._list("tokenizer.ggml.merges", str)]
        vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == NORMAL}
        if any(len(merge) != 2 for merge in merges):
            raise ValueError("a merge of its tokenizer is not a pair")
        if not all(a in vocabulary and b in vocabulary and a + b in vocabulary for a, b in merges):
            raise ValueError("a merge of its tokenizer has a token that is not in the vocabulary")
        if "" in self._token_ids:
            raise ValueError("its vocabulary has an empty token")
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": WORDS[words]}, "behavior": "Isolated", "invert": False}
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                **dict.fromkeys(("dropout", "unk_token")),
                **dict.fromkeys(("continuing_subword_prefix", "end_of_word_suffix"), ""),
                **dict.fromkeys(("fuse_unk", "byte_fallback", "ignore_merges"), False),
                "vocab": vocabulary,
                "merges": merges,
            },
        }

    def _named_tokens(self) -> dict[str, str]:
        named = {}
        for name, key in (("eos_token", "eos"), ("pad_token", "padding")):
            number = self.get(f"tokenizer.ggml.{key}_token_id", ID, None)
            if number is not None and number < len(self._tokens):
                named[name] = self._tokens[number]
        return named

    def _generation(self) -> dict[str, Any]:
        ends = self.get("tokenizer.ggml.eos_token_ids", Rule.list_of(ID), ())  # written by Ollama
        ends = [*ends, self.get("tokenizer.ggml.eos_token_id", ID, None), *map(self._token_ids.get, ENDS)]
        ends = list(dict.fromkeys(end for end in ends if end is not None))
        if never := [end for end in ends if end >= len(self._tokens)]:
            raise ValueError(f"an answer ends with token {never[0]:,}, which is not in its vocabulary")
        settings: dict[str, Any] = {"eos_token_id": ends}
        for key, (name, rule) in SAMPLING.items():
            if (value := self.get(f"general.sampling.{key}", rule, None)) is not None:
                settings |= {name: shortest(value), "do_sample": True}
        if len(settings) == 1:
            self.assume("no sampling")
        return settings

    def _template(self) -> str:
        template = self.get("tokenizer.chat_template", TEXT, "")
        if INPUTS in template:
            return template
        self.assume("chat template")
        thinks = "thinking" in self.get("general.name", TEXT, "").lower()
        return template_of(not self.traits.head_norms, "full_attention_interval" in self.traits.text, thinks)


def shortest(value: float) -> float:
    """Return the number with the fewest digits that is stored as the same float32 number."""
    if isinstance(value, int):
        return value
    stored = struct.pack("f", value)
    texts = (f"{value:.{digits}g}" for digits in range(1, 10))
    return next((float(text) for text in texts if struct.pack("f", float(text)) == stored), value)


def listed_numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
