"""Inputs of a Hugging Face model in the form its processor produces. The processor itself needs torchvision."""

from collections.abc import Sequence

import torch

from evoprune.backend import cache_name
from evoprune.model import FAMILIES

VIDEO, IMAGE = "video", "image"
CACHE = cache_name()  # name of the KV cache argument and output field of transformers models
# Timestamp before each frame pair of a Qwen3-VL video: its first token and its number of tokens.
TIME, TIME_TOKENS = 201, 4


def processed(model, *rows: Sequence, side: str = "left", seed: int = 0, seconds: float = 0.7, steps: int = 2) -> dict:
    """Return the model inputs for a batch of prompts with videos and images.

    Args:
        rows: the prompts as lists of pieces: a number of text tokens, or ("video", T, H, W) or ("image", H, W) in patches.
        side: padding side.
        seconds: duration of a frame pair in the first video. Video number i has i times this duration.
        steps: number of distinct frame pairs in a video. All other frame pairs repeat the previous one with a little noise.
    """
    config, random = model.config, torch.Generator().manual_seed(seed)
    width, apart = 6 * config.vision_config.patch_size**2, FAMILIES[config.model_type].timestamps
    pad = model.generation_config.pad_token_id or 0
    ids, videos, images, grids, shapes = [], [], [], [], []
    for pieces in rows:
        row = []
        for piece in pieces:
            if isinstance(piece, int):
                row += torch.randint(1, 200, (piece,), generator=random).tolist()
                continue
            kind, *grid = piece
            t, h, w = grid if kind == VIDEO else (1, *grid)
            scene = torch.randn(1, h * w, width, generator=random)
            patches = []
            for pair in range(t):
                if pair and pair % max(1, t // steps) == 0:
                    moved = torch.rand(h * w // 4, generator=random).repeat_interleave(4) < 0.3
                    scene = torch.where(moved[:, None], torch.randn(scene.shape, generator=random), scene)
                patches.append(scene[0] + 1e-3 * torch.randn(scene[0].shape, generator=random))
            (videos if kind == VIDEO else images).append(torch.cat(patches))
            (grids if kind == VIDEO else shapes).append([t, h, w])
            pads = config.video_token_id if kind == VIDEO else config.image_token_id
            runs = t if apart and kind == VIDEO else 1
            for _ in range(runs):
                if apart and kind == VIDEO:
                    row += [TIME, *torch.randint(1, 200, (TIME_TOKENS - 1,), generator=random).tolist()]
                row += [config.vision_start_token_id, *[pads] * (t * h * w // 4 // runs), config.vision_end_token_id]
        ids.append(row)
    length = max(map(len, ids))
    filled = [(length - len(row)) for row in ids]
    put = (lambda row, n, x: [x] * n + row) if side == "left" else (lambda row, n, x: row + [x] * n)
    input_ids = torch.tensor([put(row, n, pad) for row, n in zip(ids, filled, strict=True)])
    made = {
        "input_ids": input_ids,
        "attention_mask": torch.tensor([put([1] * len(row), n, 0) for row, n in zip(ids, filled, strict=True)]),
        "mm_token_type_ids": (input_ids == config.image_token_id) + 2 * (input_ids == config.video_token_id),
    }
    if videos:
        made |= {"pixel_values_videos": torch.cat(videos), "video_grid_thw": torch.tensor(grids)}
        if config.model_type == "qwen2_5_vl":  # Qwen2-VL's processor does not return seconds
            made["second_per_grid_ts"] = torch.tensor([seconds * (1 + i) for i in range(len(grids))])
    if images:
        made |= {"pixel_values": torch.cat(images), "image_grid_thw": torch.tensor(shapes)}
    return made
