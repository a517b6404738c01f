from functools import cache

import pytest
import torch

from evoprune.vision.layout import geometry
from experiments.demo.build import build_config, init_weights
from experiments.demo.forward import attend, language, tower, window_buckets


@cache
def demo_model():
    """The demo architecture with random weights, in float32; not to be changed by a test."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        build_config(), dtype=torch.float32, attn_implementation="sdpa"
    )
    random = torch.Generator().manual_seed(0)
    init_weights(model, random)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases of a fresh model are ones and zeros, which hides much
                weight += 0.1 * torch.randn(weight.shape, generator=random)
    return model.eval()


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", [(1, 1, 1), (1, 4, 6), (2, 5, 7), (3, 4, 4), (2, 3, 2), (1, 9, 6), (2, 1, 5)])
@torch.no_grad()
def test_the_tower_is_hugging_faces(grid):
    visual = demo_model().model.visual
    patches = noise(grid[0] * grid[1] * grid[2] * 4, 1176)
    theirs = visual(patches, torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]]))
    merged, flat = tower(visual, patches, grid[1], grid[2])
    assert merged.shape == (grid[0], grid[1] * grid[2], 192) and flat.shape == (grid[0], grid[1] * grid[2], 512)
    torch.testing.assert_close(merged.flatten(0, 1), theirs.pooler_output, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(visual.merger.mlp(flat), merged)


@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_the_language_model_is_hugging_faces(batch):
    model = demo_model()
    text, length = model.model.language_model, 40
    embeds = noise(batch, length, 192)
    random = torch.Generator().manual_seed(1)
    # Text, a video whose three axes differ, text; each sample its own.
    positions = torch.arange(length).expand(3, batch, length).clone()
    positions[:, :, 10:30] = 10 + torch.randint(0, 12, (3, batch, 20), generator=random)
    bias = torch.zeros(batch, 1, length, length).masked_fill_(~torch.ones(length, length).tril().bool(), -1e4)
    section = model.config.text_config.rope_parameters["mrope_section"]
    hidden = language(text, embeds, positions, bias, section)
    order = torch.arange(length).expand(1, batch, length)
    theirs = text(inputs_embeds=embeds, position_ids=torch.cat([order, positions]), use_cache=False).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model.lm_head(theirs), atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_video_and_question_together_give_hugging_faces_logits():
    model, grid = demo_model(), (2, 5, 3)
    units = grid[0] * grid[1] * grid[2]
    patches = noise(units * 4, 1176)
    ids = torch.tensor([[1, 300, 3, *[7] * units, 4, 301, 302, 303]])
    length = ids.shape[1]
    order = torch.arange(length)
    steps = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    positions = torch.stack([order.clone() for _ in range(3)])
    positions[:, 3 : 3 + units] = 3 + steps * torch.tensor([[2], [1], [1]])
    positions[:, 3 + units :] = 3 + max(grid[1], 3) + torch.arange(length - 3 - units)
    theirs = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values_videos=patches,
        video_grid_thw=torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]]),
        position_ids=torch.cat([order[None], positions])[:, None],
        use_cache=False,
    ).logits
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 3 : 3 + units] = tower(model.model.visual, patches, *grid[1:])[0].flatten(0, 1)
    bias = torch.zeros(1, 1, length, length).masked_fill_(~torch.ones(length, length).tril().bool(), -1e4)
    section = model.config.text_config.rope_parameters["mrope_section"]
    hidden = language(model.model.language_model, embeds, positions[:, None], bias, section)
    torch.testing.assert_close(model.lm_head(hidden), theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 7), (8, 3), (9, 9)])
def test_window_buckets_are_the_windows_of_the_layout(size):
    geo = geometry(*size)
    made = sorted(window for bucket in window_buckets(*size) for window in bucket.tolist())
    expected = [[] for _ in range(geo.windows)]
    for place, window in enumerate(geo.window.tolist()):
        expected[window].append(place)
    assert made == sorted(expected)


def test_attention_is_torchs():
    q, k, v = noise(3, 2, 4, 9, 8)
    bias = torch.zeros(9, 9).masked_fill_(~torch.ones(9, 9).tril().bool(), -1e4)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(attend(q, k, v, bias), expected, atol=1e-6, rtol=1e-5)


def test_gradients_reach_every_weight_of_the_tower():
    visual = demo_model().model.visual
    merged, _ = tower(visual, noise(4 * 6 * 4, 1176), 4, 6)
    grads = torch.autograd.grad(merged.square().sum(), list(visual.parameters()))
    names = [name for name, _ in visual.named_parameters()]
    silent = [name for name, grad in zip(names, grads, strict=True) if not grad.abs().sum() > 0]
    assert not silent
