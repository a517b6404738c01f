"""Write a checkpoint with a published model's dimensions and the hub's file layout, but with random weights.

    python -m experiments.speed.checkpoint CKPT                                    # 3B: 7.5 GB in two shards

The checkpoint is as large as the published one and takes as long to load, but the model's answers are meaningless.
`experiments.speed.first_word` creates such a checkpoint.
"""

import argparse
import json
import random
import shutil
from pathlib import Path

import torch

from evoprune.bundled import DEMOS
from evoprune.model import Config, QwenVL
from evoprune.session import BUNDLED_CONFIGS

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
WORDS = 151_643  # size of the published vocabulary without special tokens
# Sorted by ID. Their IDs follow the last word's ID.
SPECIAL_TOKENS = (
    "endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start", "quad_end",
    "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad",
)  # fmt: skip


def write_checkpoint(
    folder: Path, model: str = MODEL, shards: int = 2, mtp: bool = False, layers: int | None = None
) -> None:
    """Write bf16 weights and the config, tokenizer, and processor settings to `folder`, which must not exist yet.

    Args:
        mtp: Whether to include the layer for multi-token prediction, as published. Its random drafts are never accepted.
        layers: Number of language model layers, of which the last one is an attention layer. None means as published.
    """
    made = folder.with_name(folder.name + ".writing")
    made.mkdir()
    write_settings(made, model, mtp, layers)
    config = Config.parse(json.loads((made / "config.json").read_text(encoding="utf-8")))
    write_weights(made, QwenVL.random(config, torch.bfloat16, torch.device("cpu")), shards)
    made.rename(folder)


def write_settings(folder: Path, model: str = MODEL, mtp: bool = False, layers: int | None = None) -> None:
    """Write the config, tokenizer, and processor settings to `folder`. A model with random weights requires nothing else.

    See `write_checkpoint` for the arguments.
    """
    config = json.loads(BUNDLED_CONFIGS[model].read_text(encoding="utf-8"))
    text = config["text_config"]
    if not mtp:
        text.pop("mtp_num_hidden_layers", None)
    if layers:
        text["num_hidden_layers"] = layers
        if "full_attention_interval" in text:
            text["full_attention_interval"] = min(layers, text["full_attention_interval"])
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        shutil.copyfile(DEMOS["demo"].folder / name, folder / name)
    tokenizer = _tokenizer(json.loads((DEMOS["demo"].folder / "tokenizer.json").read_text(encoding="utf-8")))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    # There is no end-of-sequence token, so all answers reach the maximum length.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": []}), encoding="utf-8")


def write_weights(folder: Path, model: QwenVL, shards: int) -> None:
    """Write a model's weights in the form of published checkpoints. Tied weights are written once."""
    from safetensors.torch import save_file

    older = not model.config.text_config.head_norms  # Qwen2-VL and Qwen2.5-VL
    weights = {_published(name) if older else name: weight for name, weight in model.named_parameters()}
    if model.config.vision_config.traits.transposes_experts:
        weights |= {
            name: weight.transpose(1, 2).contiguous() for name, weight in weights.items() if ".experts." in name
        }
    total = sum(weight.nbytes for weight in weights.values())
    seen = 0
    pieces: list[dict[str, torch.Tensor]] = [{} for _ in range(shards)]
    for name, weight in weights.items():
        pieces[seen * shards // total][name] = weight
        seen += weight.nbytes
    files = {}
    for number, piece in enumerate(pieces, 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file(piece, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(piece, file)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _published(name: str) -> str:
    """Return a weight's name in older published checkpoints: the inverse of `name_in_memory` (session/loading/weights.py)."""
    return name.replace("model.language_model.", "model.", 1).replace("model.visual.", "visual.", 1)


def _tokenizer(demo: dict) -> dict:
    """Return a tokenizer with as many words as the published one: the demo's words, and random concatenations of them."""
    special = {token["content"] for token in demo["added_tokens"]}
    words = [word for word in demo["model"]["vocab"] if word not in special]
    known = set(words)
    merges = list(demo["model"]["merges"])
    draw = random.Random(0)  # noqa: S311 (no secret)
    while len(words) < WORDS:
        first = draw.choice(words)
        second = draw.choice(words)
        if len(first) + len(second) <= 12 and first + second not in known:
            words.append(first + second)
            known.add(first + second)
            merges.append([first, second])
    added = [
        demo["added_tokens"][0] | {"id": WORDS + number, "content": f"<|{name}|>", "special": True}
        for number, name in enumerate(SPECIAL_TOKENS)
    ]
    vocabulary = {word: number for number, word in enumerate(words)}
    return demo | {"added_tokens": added, "model": demo["model"] | {"vocab": vocabulary, "merges": merges}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default=MODEL, choices=sorted(BUNDLED_CONFIGS))
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--mtp", action="store_true", help="include the layer for multi-token prediction")
    parser.add_argument("--layers", type=int, help="number of language model layers (default: as published)")
    write_checkpoint(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
