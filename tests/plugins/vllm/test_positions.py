"""Positions of prompts with pruned videos, against the positions of the whole prompt without the dropped columns."""

from dataclasses import replace

import pytest
import torch

from evoprune.language import Place, prompt_positions, prune_prompt, video_positions
from evoprune_vllm.positions import (
    LIMIT,
    as_columns,
    extent,
    from_columns,
    generated_offset,
    known_positions,
    split_bias,
    with_videos,
)
from tests.tiny import encoded_tokens

TEXT, PICTURE, VIDEO = 0, 1, 2
# Items of a prompt, with text before each and one text at the end.
ITEMS = [
    (3, VIDEO, (6, 3, 5), 0.7),
    (0, PICTURE, (1, 4, 6), 1.0),
    (2, VIDEO, (300, 2, 2), 1.37),
    (1, VIDEO, (2, 2, 3), 0.5),
]
END = 4


def prompt(per_second, share=0.3):
    """Return a prompt: ids, items, kept units per video, the right positions, and the position that follows."""
    random = torch.Generator().manual_seed(0)
    whole, spans, columns, ids, items, kept = 0, [], [], [], [], []
    for text, kind, grid, seconds in ITEMS:
        units = grid[0] * grid[1] * grid[2]
        keep = units if kind == PICTURE else max(1, round(share * units))
        chosen = torch.randperm(units, generator=random)[:keep].sort().values
        columns += [whole + i for i in range(text)] + (whole + text + chosen).tolist()
        ids += [TEXT] * text
        spans.append((whole + text, video_positions(grid, seconds, per_second)))
        known = video_positions(grid, seconds, per_second) if keep == units else None
        items.append((len(ids), keep, extent(grid, seconds, per_second), known))
        ids += [kind] * keep
        whole += text + units
        kept += [chosen] if kind == VIDEO else []
    columns += [whole + i for i in range(END)]
    right = prompt_positions(whole + END, spans)
    return torch.tensor(ids + [TEXT] * END), items, kept, right[:, columns], int(right.max()) + 1


def columns_of(kept, per_second, dtype):
    videos = [item for item in ITEMS if item[1] == VIDEO]
    return [
        as_columns(video_positions(grid, seconds, per_second)[:, units], torch.zeros(len(units)), dtype)
        for units, (_, _, grid, seconds) in zip(kept, videos, strict=True)
    ]


@pytest.mark.few(4)
@pytest.mark.parametrize("per_second", [2.0, 25.0, None])
@pytest.mark.parametrize("chunk", [1000, 7, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_positions_are_those_of_the_whole_prompt_without_the_dropped_columns(per_second, chunk, dtype):
    ids, items, kept, right, following = prompt(per_second)
    rows = torch.cat(columns_of(kept, per_second, dtype))
    positions, offset = known_positions(len(ids), items)
    assert offset == following - len(ids)
    for start in range(0, len(ids), chunk):
        videos = ids == VIDEO
        before, now = int(videos[:start].sum()), int(videos[start : start + chunk].sum())
        places = videos[start:].nonzero()[:, 0] + start
        positions = with_videos(positions, places[:now], from_columns(rows[before : before + now]))
        end = min(start + chunk, len(ids))
        assert torch.equal(positions[:, start:end], right[:, start:end])
        assert generated_offset(positions) == offset
    assert torch.equal(positions, right)


def test_known_and_written_positions():
    """Positions of text are right even if the prefix cache holds the video. A written position is never overwritten."""
    ids, items, kept, right, _ = prompt(2.0)
    rows, places = torch.cat(columns_of(kept, 2.0, torch.float32)), (ids == VIDEO).nonzero()[:, 0]
    positions, _ = known_positions(len(ids), items)
    assert torch.equal(positions[:, ids != VIDEO], right[:, ids != VIDEO]) and (positions[:, ids == VIDEO] < 0).all()
    positions = with_videos(positions, places, from_columns(rows))
    again = with_videos(positions, places[1:], from_columns(rows[:-1]))  # as speculative decoding calls it
    assert torch.equal(again, right)


@pytest.mark.parametrize("chosen", ["all", "some", "of two frame pairs", "none of the last"])
def test_positions_of_rows_behind_times(chosen):
    """The whole prompt's positions without the dropped units: timestamps and markers keep theirs."""
    grid, words, start = (4, 2, 3), [5, 5, 6, 6], 7
    units, before = 6, [start]
    for count in words:
        before.append(before[-1] + count + units + 1)
    starts = [at + count for at, count in zip(before, words, strict=False)]
    right = prompt_positions(before[-1] + 4, [(at, video_positions((1, 2, 3), 1.0, None)) for at in starts])
    kept = {
        "all": torch.arange(24),
        "some": torch.tensor([0, 3, 7, 13, 14, 20]),
        "of two frame pairs": torch.tensor([6, 7, 18, 23]),
        "none of the last": torch.tensor([1, 8, 12]),
    }[chosen]
    dropped = {starts[unit // units] + unit % units for unit in range(24)} - {
        starts[unit // units] + unit % units for unit in kept.tolist()
    }
    columns = [column for column in range(start, before[-1]) if column not in dropped]
    place = replace(Place.of_pairs(words, units), around=())
    ids = torch.zeros(place.runs[-1].stop + 1, dtype=torch.int64)
    own = prompt_positions(len(ids), place.positions(grid, 1.0, None))
    made = prune_prompt(ids, [place], [encoded_tokens(torch.zeros(len(kept), 1), kept, grid=grid)], own)
    assert torch.equal(made.positions + start, right[:, columns])
    places = {column for at in starts for column in range(at, at + units)}
    assert made.visual.tolist() == [column in places for column in columns]
    items = [(start, len(columns), sum(words) + 4 + 4 * 3, None)]
    of_prompt, offset = known_positions(start + len(columns) + 4, items)
    assert torch.equal(of_prompt[:, :start], right[:, :start]) and torch.equal(of_prompt[:, -4:], right[:, -4:])
    assert offset == int(right.max()) + 1 - of_prompt.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("number", [torch.int64, torch.int32])
def test_the_bias_travels_with_the_positions_exactly(dtype, number):
    positions = torch.randint(0, LIMIT // 2, (3, 1000), generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-3, 20, 1000).float().exp().log1p() * torch.linspace(-1, 1, 1000)
    found = from_columns(as_columns(positions, bias, dtype))
    start = LIMIT // 2 - 1
    plain, carried = split_bias((found + start).to(number))
    assert torch.equal(plain.long(), positions + start)
    assert torch.equal(carried, bias)
