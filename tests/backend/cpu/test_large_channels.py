"""Test 8 bits on trained weights with four channels made 100 times larger before every product, which changes nothing in fp32."""

import pytest
import torch

from evoprune import VideoQA
from evoprune.backend import Quantization
from evoprune.backend.cpu.quantize import MAX_LARGE
from evoprune.bench import Reference
from evoprune.session import calibrate, load_model
from experiments.demo.write import clips_asked, demo_video
from tests.quantized import parameters

CLIPS = 8


def grow(norm, *layers):
    """Multiply channels of a norm by 100, and divide the weights that read them by 100."""
    norm.weight[:4] *= 100
    for layer in layers:
        layer.weight[:, :4] /= 100


@torch.no_grad()
def demo(kind, share=MAX_LARGE) -> VideoQA:
    """Return the demo with large channels. `share`: largest share of the channels that is computed separately."""
    loaded = load_model("demo", pack=False)
    tower, language = loaded.model.model.visual, loaded.model.model.language_model
    for block in tower.blocks:
        grow(block.norm1, block.attn.qkv)
        grow(block.norm2, block.mlp.gate_proj, block.mlp.up_proj)
    for layer in language.layers:
        attention = layer.self_attn
        grow(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        grow(layer.post_attention_layernorm, layer.mlp.gate_proj, layer.mlp.up_proj)
    if kind != "none":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("evoprune.backend.cpu.quantize.MAX_LARGE", share)
            Quantization(kind).apply(loaded.model, calibrate)
    return VideoQA(loaded, budget=1.0)


@pytest.mark.full
@pytest.mark.parametrize("kind", parameters("int8"))
def test_answers_stay_where_large_channels_are_apart_and_only_there(kind, tmp_path):
    plain = VideoQA.load("demo", budget=1.0)
    models = {"float32": demo("none"), "apart": demo(kind), "together": demo(kind, 0.0)}
    agree, tokens = dict.fromkeys(models, 0), 0
    for clip in clips_asked("shapes", "validation", 51, CLIPS):
        with demo_video(clip, tmp_path) as video:
            first = plain.encode(video.path)
            encoded = {name: model.encode(video.path) for name, model in models.items()}
            for row in video.rows:
                answer = first.ask(row.prompt, max_new_tokens=16)
                given = Reference.of(first, row.prompt, "".join(answer) and answer.ids, ended=True)
                tokens += len(given.ids)
                for name, each in encoded.items():
                    agree[name] += int(given.agreement(each).agrees.sum())
    assert agree["float32"] == tokens
    # With AVX512-bf16, "together" agrees on 93 of 102 tokens (0.912). On other CPUs it agrees on fewer.
    assert agree["apart"] >= 0.99 * tokens and agree["together"] < 0.92 * tokens
