"""Build the untrained model for the second world: architecture, tokenizer, and initial weights. Imported by `train_scenes`."""

from collections.abc import Iterator

import numpy as np
import torch

from evoprune.batch import Row
from experiments.demo.build import VOCABULARY, build_tokenizer
from experiments.demo.painting import CHARACTERS
from experiments.demo.questions import Question
from experiments.demo.scenes.asking import ask
from experiments.demo.scenes.compose import make_clip
from experiments.demo.scenes.happening import types_for

HIDDEN = 128
# Every trained vision tower has a few residual stream channels with large values in all rows. These are the indices and values of
# such channels in this tower. They are implemented as a bias of the first layer, because Qwen's patch embedding has no bias.
LARGE = {5: 9.0, 37: -14.0, 90: 7.0}


def scenes_config():
    """Return a config with the exact architecture of Qwen2.5-VL.

    As in the real tower, the first full-attention layer comes after a quarter of the layers.
    """
    from transformers import Qwen2_5_VLConfig

    return Qwen2_5_VLConfig(
        vision_config={
            "depth": 16, "hidden_size": HIDDEN, "intermediate_size": 320, "num_heads": 4, "out_hidden_size": 256,
            "fullatt_block_indexes": [3, 7, 11, 15], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
            "temporal_patch_size": 2, "tokens_per_second": 2,
        },
        text_config={
            "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 6,
            "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [7, 5, 4]},
            "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": True,
        },
        tie_word_embeddings=True, vision_start_token_id=3, vision_end_token_id=4, image_token_id=6, video_token_id=7,
    )  # fmt: skip


@torch.no_grad()
def keep_large(visual) -> None:
    """Reset the large channels to their values after an optimizer step."""
    bias = visual.blocks[0].mlp.down_proj.bias
    for channel, value in LARGE.items():
        bias[channel] = value


def prompt(question: Question) -> str:
    """Return a question's text as the model sees it. It is the same as in `evoprune eval`, with a letter for each option."""
    return Row("", (), (), question.question, options=question.options).prompt


def scenes_tokenizer(clips: int = 1200):
    """Return a tokenizer like the one for shapes, but trained on questions about `clips` clips of scenes.

    Sign text is excluded, so that the model reads signs letter by letter.
    """

    def texts() -> Iterator[str]:
        yield " ".join(CHARACTERS)
        for seed in range(clips):
            clip = make_clip("train", seed)
            written = {t.text for t in clip.signs} | {t.after for t in clip.signs}
            for q in ask(clip, np.random.default_rng(seed), 8, types_for(clip)):
                yield from (
                    line
                    for line in prompt(q).split("\n")
                    if not any(word.isupper() and len(word) > 1 for word in line.split())
                )
                if q.answer not in written:
                    yield q.answer

    return build_tokenizer(texts())
