"""Train a small language model of the Qwen3.5 family, and its layer for multi-token prediction, from scratch on a CPU.

    python -m experiments.demo.train_mtp OUT

The model learns from texts alone: it reads a list of the things in a clip of the demo's first world, and answers a question, most
often by describing the clip in sentences. Its tower keeps random weights. In the first stage, the language model is trained on
the answers. In the second stage, the layer for multi-token prediction is trained on its frozen hidden states, with the whole text
in view, as in published checkpoints. The finished model in OUT has the hub's file layout.

`tests.language.drafts` measures how many of the layer's drafts the model accepts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from experiments.demo.build import AFTER_QUESTION, VOCABULARY, build_tokenizer, init_weights
from experiments.demo.clips import Clip, make_clip
from experiments.demo.questions import MAKERS, WEIGHTS, ask
from experiments.demo.training import Learn, Log, Run, in_worker, optimizers, recipe_parser, resumed, run_stage

BEFORE = "<|im_start|>user\n"
# Questions that a list of things answers.
TYPES = "colour", "shape", "motion", "size", "digit", "digit_colour", "event", "which", "exists", "describe"
ODDS = {"describe": 12.0}  # about every second question


@dataclass(frozen=True)
class MtpRecipe:
    """Training run hyperparameters."""

    seed: int = 0
    steps: int = 1000
    mtp_steps: int = 500
    batch: int = 32
    muon_lr: float = 5e-3
    adam_lr: float = 3e-3
    warmup: int = 50
    decay: float = 0.6


def listed(clip: Clip) -> str:
    """Return a clip's things from left to right, one per line. The order of the words differs from that in descriptions."""
    lines = []
    for t in sorted(clip.things, key=lambda t: t.centre(max(t.start, 0.0))[0]):
        kind = f"digit {t.kind}" if t.is_digit else t.kind
        lines.append(f"{kind}, {t.event(clip.seconds)}, {t.motion}, {t.colour}, {t.size}")
    return "\n".join(lines)


def text_of(split: str, seed: int, types: tuple[str, ...] = TYPES) -> tuple[str, str]:
    """Return a prompt about a clip, and the answer."""
    clip = make_clip(split, seed)
    makers = {name: MAKERS[name] for name in types}
    (question,) = ask(clip, np.random.default_rng(seed), 1, makers, WEIGHTS | ODDS)
    return f"{BEFORE}{listed(clip)}\n{question.question}{AFTER_QUESTION}", question.answer


def text_config(tokenizer):
    """Return a config with the architecture of Qwen3.5: each attention layer follows a Gated DeltaNet."""
    from transformers import Qwen3_5Config

    return Qwen3_5Config(
        vision_config={
            "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 128, "patch_size": 16,
            "num_position_embeddings": 144, "spatial_merge_size": 2, "temporal_patch_size": 2, "deepstack_visual_indexes": [],
        },
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "layer_types": ["linear_attention", "full_attention"] * 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 32,
            "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 1000.0, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
            "bos_token_id": 0, "eos_token_id": 2, "tie_word_embeddings": True, "mtp_num_hidden_layers": 1,
        },
        tie_word_embeddings=True, vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip


class Mtp(nn.Module):
    """The layer for multi-token prediction, from transformers' modules. Its parameters have the names of published tensors."""

    def __init__(self, config):
        from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm

        super().__init__()
        wide = config.hidden_size
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden, self.norm = (
            Qwen3_5RMSNorm(wide, config.rms_norm_eps) for _ in range(3)
        )
        self.fc = nn.Linear(2 * wide, wide, bias=False)
        full = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3_5DecoderLayer(config, full)])

    def forward(self, embeds: torch.Tensor, hidden: torch.Tensor, places: tuple) -> torch.Tensor:
        """Return the final hidden states, `[B, L, hidden]`, given the embeddings of the tokens after the columns."""
        both = torch.cat([self.pre_fc_norm_embedding(embeds), self.pre_fc_norm_hidden(hidden)], -1)
        return self.norm(self.layers[0](self.fc(both), position_embeddings=places))


def initial(module: nn.Module, seed: int) -> None:
    """Initialize the weights as in `init_weights`. The norms multiply by 1 plus their weights."""
    rates = {name: p.clone() for name, p in module.named_parameters() if name.endswith(("A_log", "dt_bias"))}
    init_weights(module, torch.Generator().manual_seed(seed))
    for name, p in module.named_parameters():
        if name in rates:
            p.data.copy_(rates[name])
        elif (name.endswith("norm.weight") and "linear_attn" not in name) or ".pre_fc_norm" in f".{name}":
            p.data.zero_()


def batches(recipe: MtpRecipe, tokenizer, stage: int, first: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token IDs, int64 `[B, L]`, and whether each of them belongs to an answer, bool `[B, L]`."""
    step = first
    while True:
        rng = np.random.default_rng((recipe.seed, stage, step))
        pairs = [text_of("train", int(seed)) for seed in rng.integers(2**62, size=recipe.batch)]
        rows = [[tokenizer(text, add_special_tokens=False).input_ids for text in pair] for pair in pairs]
        longest = max(len(prompt) + len(answer) + 1 for prompt, answer in rows)
        ids, answers = torch.zeros(2, recipe.batch, -(-longest // 16) * 16, dtype=torch.int64)
        for number, (prompt, answer) in enumerate(rows):
            whole = torch.tensor([*prompt, *answer, 2])
            ids[number, : len(whole)] = whole
            answers[number, len(prompt) : len(whole)] = 1
        yield ids, answers.bool()
        step += 1


def loss_of(
    hidden: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, held: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """Return the loss on the tokens that the hidden states predict, and the share of correct predictions."""
    logits = F.linear(hidden[held], head)
    target = ids[held]
    return F.cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean().item()


def train(folder: Path, recipe: MtpRecipe) -> None:
    """Run both stages, resuming from the checkpoint in `folder` if there is one."""
    from transformers import Qwen3_5ForConditionalGeneration

    run = Run(folder, recipe)
    tokenizer = build_tokenizer(part for seed in range(3000) for part in text_of("train", seed))
    torch.manual_seed(recipe.seed)
    model = Qwen3_5ForConditionalGeneration(text_config(tokenizer))
    text = model.model.language_model
    mtp = Mtp(text.config)
    initial(model, recipe.seed)
    initial(mtp, recipe.seed + 1)
    embed = text.embed_tokens

    def language_step(batch, learn: Learn, log: Log) -> None:
        ids, answers = batch
        loss, right = loss_of(
            text(inputs_embeds=embed(ids)).last_hidden_state[:, :-1], embed.weight, ids[:, 1:], answers[:, 1:]
        )
        learn(loss)
        log.add("loss", loss.item())
        log.add("right", right)

    def mtp_step(batch, learn: Learn, log: Log) -> None:
        ids, answers = batch
        with torch.no_grad():
            hidden = text(inputs_embeds=embed(ids)).last_hidden_state
            following = embed(ids[:, 1:])
            places = text.rotary_emb(hidden, torch.arange(ids.shape[1] - 1).expand(3, 1, -1))
        loss, right = loss_of(
            mtp(following, hidden[:, :-1], places)[:, :-1], embed.weight.detach(), ids[:, 2:], answers[:, 2:]
        )
        learn(loss)
        log.add("loss", loss.item())
        log.add("right", right)

    state = run.load()
    if state:
        model.load_state_dict(state["modules"][0])
        mtp.load_state_dict(state["modules"][1])
    stages = {1: (recipe.steps, [text], language_step), 2: (recipe.mtp_steps, [mtp], mtp_step)}
    for stage in range(state["stage"] if state else 1, 3):
        count, modules, step = stages[stage]
        opts = optimizers(recipe, modules)
        steps = range(resumed(opts, state), count)
        made = in_worker(batches, recipe, tokenizer, stage, steps.start)
        run_stage(run, stage, steps, (model, mtp), opts, lambda _, *how, step=step, made=made: step(next(made), *how))
        state = None
    save(folder, model, mtp, tokenizer)
    run.log(done=True)


def save(folder: Path, model, mtp: Mtp, tokenizer) -> None:
    """Save the model in float32, and the layer for multi-token prediction with the names of published checkpoints."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors") | {f"mtp.{name}": each for name, each in mtp.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    normal = {name: [0.5] * 3 for name in ("image_mean", "image_std")}
    (folder / "preprocessor_config.json").write_text(json.dumps(normal | {"patch_size": 16}))


def main() -> None:
    parser = recipe_parser(__doc__, MtpRecipe())
    values = vars(parser.parse_args())
    train(values.pop("out"), MtpRecipe(**values))


if __name__ == "__main__":
    main()
