from functools import cache

import pytest
import torch

from experiments.demo.build import build_config, init_weights
from experiments.demo.forward import tower
from experiments.demo.shared_prompts import CHUNK, hidden_of_rows


@cache
def demo_model():
    """The demo architecture with random weights, in float32. It is shared, so tests must not change it."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        build_config(), dtype=torch.float32, attn_implementation="sdpa"
    )
    random = torch.Generator().manual_seed(0)
    init_weights(model, random)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:  # a new model's norms and biases are ones and zeros, which hides many errors
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


def video_positions(grid: tuple[int, int, int]) -> torch.Tensor:
    """Return positions of a token, a video and a token: int64 `[3, units + 2]`."""
    steps = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    ends = torch.tensor([[0], [0], [0]]), torch.tensor([[max(grid) + 7]]).expand(3, 1)
    return torch.cat([ends[0], 1 + steps * torch.tensor([[2], [1], [1]]), ends[1]], 1)


@pytest.mark.parametrize("grid", [(2, 5, 3), (1, 2, 2), (3, 10, CHUNK // 28)])
@torch.no_grad()
def test_each_question_behind_a_shared_prompt_gets_hugging_faces_logits(grid):
    """Two prompts, two rows each, two questions per row. The reference is Hugging Face's model on prompt and question alone."""
    model, units = demo_model(), grid[0] * grid[1] * grid[2]
    patches = noise(2 * units * 4, 1176)
    where, prompt = video_positions(grid), torch.tensor([3, *[7] * units, 4])
    merged = tower(model.model.visual, patches, *grid[1:])[0].reshape(2, units, -1)
    embed = model.get_input_embeddings()
    prefix = torch.stack([torch.cat([embed(prompt[:1]), video, embed(prompt[-1:])]) for video in merged])
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(300, 500, (2, 2, 9), generator=random)
    segment = torch.tensor([1] * 5 + [2] * 4).expand(2, 2, 9)
    start = int(where.max()) + 1
    place = (start + torch.tensor([*range(5), *range(4)])).expand(2, 2, 9)
    own = (segment[..., None] == segment[..., None, :]) & torch.ones(9, 9, dtype=torch.bool).tril()
    section = model.config.text_config.rope_parameters["mrope_section"]
    hidden, _ = hidden_of_rows(model.model.language_model, prefix, where, embed(tokens), place, own, section)
    for clip in range(2):
        for row in range(2):
            for part in (slice(0, 5), slice(5, 9)):
                asked = tokens[clip, row, part]
                positions = torch.cat([where, (start + torch.arange(len(asked))).expand(3, -1)], 1)
                order = torch.arange(positions.shape[1])[None]
                theirs = model(
                    input_ids=torch.cat([prompt, asked])[None],
                    pixel_values_videos=patches[clip * units * 4 : (clip + 1) * units * 4],
                    video_grid_thw=torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]]),
                    position_ids=torch.cat([order, positions])[:, None],
                    use_cache=False,
                ).logits[0, -len(asked) :]
                torch.testing.assert_close(model.lm_head(hidden[clip, row, part]), theirs, atol=3e-5, rtol=3e-5)


def test_gradients_reach_every_weight_of_the_tower():
    visual = demo_model().model.visual
    merged, _ = tower(visual, noise(4 * 6 * 4, 1176), 4, 6)
    grads = torch.autograd.grad(merged.square().sum(), list(visual.parameters()))
    names = [name for name, _ in visual.named_parameters()]
    silent = [name for name, grad in zip(names, grads, strict=True) if not grad.abs().sum() > 0]
    assert not silent
