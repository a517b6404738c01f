"""What of an input will be read and computed: frames, subtitles, rows; decided before any frame is read, with the memory."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from evoprune.backend.devices import largest_piece
from evoprune.errors import USE_LESS, OutOfMemory
from evoprune.language.prompt import Tokenizer
from evoprune.methods.plans import EncoderPlan, SetAside
from evoprune.model.config import PATCHES, Config
from evoprune.model.cost import carried_bytes, shortage, working_memory
from evoprune.session.ahead import plan_frames
from evoprune.session.options import SamplingOptions
from evoprune.session.session import Session
from evoprune.util import clock, counted
from evoprune.video.frames import read_subtitles
from evoprune.video.info import (
    NO_SUBTITLES,
    NOTHING_SAID,
    PICTURE,
    PromptSubtitles,
    SubtitleLine,
    Subtitles,
    Video,
    check_picture,
)
from evoprune.video.plan import Plan, SamplingPlan
from evoprune.vision.tower import tower_shape

TEXT = 64  # tokens of a prompt around the video, roughly


def prompt_subtitles(
    tokenizer: Tokenizer, info: Video, span: SamplingPlan, choice: str, max_tokens: int
) -> PromptSubtitles:
    """Return the subtitles of a span of a video, in at most so many tokens.

    `choice`, errors: as of `frames.read_subtitles`; or none.
    """
    if choice == NO_SUBTITLES:
        return NOTHING_SAID
    if info.kind == PICTURE:
        check_picture(info, choice)
        return PromptSubtitles(note=f"{info.path} is a picture")
    return fit(tokenizer, read_subtitles(info, choice, span.start_s, span.end_s), max_tokens)


def fit(tokenizer: Tokenizer, found: Subtitles, max_tokens: int) -> PromptSubtitles:
    """Return the most lines, evenly over all, that take at most `max_tokens`.

    No line is cut; longer ones than that are left out.
    """
    longest = 16 * max_tokens  # characters: longer texts are not encoded to be counted, which might take minutes
    lines = [line for line in found.lines if len(line[2]) <= longest]
    # A line has more than one token, so this many are too many. Then the interval is halved.
    fits = 0
    too_many = min(len(lines), max_tokens) + 1
    text = ""
    tokens = 0
    while too_many - fits > 1:
        count = (fits + too_many) // 2
        middles = [(2 * i + 1) * len(lines) // (2 * count) for i in range(count)]  # of equal shares
        block = as_text([lines[i] for i in middles])
        needed = max_tokens + 1
        if len(block) <= longest:
            needed = len(tokenizer.encode(block))
        if needed <= max_tokens:
            fits = count
            text = block
            tokens = needed
        else:
            too_many = count
    return PromptSubtitles(text, found.source, len(found.lines), fits, tokens, tuple(found.warnings), found.note)


def as_text(lines: Sequence[SubtitleLine]) -> str:
    """Return the lines with their times, the second that has begun, under a title, with an empty line at the end."""
    times = [clock(max(0, int(start))).removesuffix(".0") for start, _, _ in lines]
    return "\n".join(
        ["Subtitles:", *(f"[{time}] {text}" for time, (_, _, text) in zip(times, lines, strict=True)), "", ""]
    )


def plan_input(session: Session, info: Video, sampling: SamplingOptions, name: str | None = None) -> Plan:
    """Plans which frames of a video are looked at, or how large a picture, and what the encoder does with them.

    Raises VideoError: missing, unreadable or empty, or so are its subtitles. UsageError: an unknown or missing decoder.
    """
    loaded = session.loaded
    limits = loaded.limits[info.kind]
    full = plan_frames(info, sampling, limits, loaded.found.max_visual_tokens)
    encoder = session.pruning.plan(tower_shape(loaded.model.model.visual), full.grid)
    lines = sampling.subtitles, sampling.max_subtitle_tokens
    return replace(
        full.shrunk(encoder.grid, limits),
        encoder=encoder,
        unshrunk=full,
        name=name or info.path,
        subtitles=prompt_subtitles(loaded.tokenizer, info, full.sampling, *lines),
    )


def encoding_bytes(
    config: Config, encoder: EncoderPlan, piece_units: int, bytes_each: int, prompt: int | Sequence[int]
) -> int:
    """Bytes that encoding a video and reading the prompt take beside the weights, roughly.

    `bytes_each`: of a weight. `prompt`: tokens that the language model reads, in each layer or in all.
    """
    row_bytes = PATCHES * config.vision_config.hidden_size
    rows = max(encoder.layers)
    left = encoder.rows
    more = 0
    if any(stage.whole_pairs for stage in encoder.row_stages):
        more = encoder.units * row_bytes * 4  # the means of all frame pairs are made in float32
    if any(isinstance(stage.reduce, SetAside) for stage in encoder.stages):
        more = 2 * encoder.units * row_bytes * (bytes_each + 4)  # their earlier states, and in float32 how they move
    return working_memory(config, encoder.units, piece_units, prompt, bytes_each, rows, left) + more


def piece_sizes(device: torch.device, encoder: EncoderPlan) -> list[int]:
    """Return how many rows may go through a product at a time: the usual number, then half as many each time, down to a frame
    pair.
    """
    largest = largest_piece(device)
    sizes = [largest]
    size = min(largest, encoder.units)
    min_units = encoder.grid[1] * encoder.grid[2]
    while size > min_units:
        size = max(min_units, size // 2)
        sizes.append(size)
    return sizes


def fitting_pieces(session: Session, plan: Plan, other_tokens: int = TEXT) -> list[int]:
    """Return those of `piece_sizes` for which there is enough memory.

    Raises OutOfMemory: there is not enough even for a frame pair, or for the prompt, with `other_tokens` beside the video's.
    """
    model = session.loaded.model
    encoder = plan.encoder
    sizes = piece_sizes(model.device, encoder)
    pair = encoder.grid[1] * encoder.grid[2]
    prompt = session.prompt_columns(encoder.keep, other_tokens)
    for number, size in enumerate(sizes):
        needed = encoding_bytes(model.config, encoder, max(pair, size), model.dtype.itemsize, prompt)
        short = shortage(needed, str(model.device))
        if short and session.loaded.patches.clear():  # of earlier inputs
            short = shortage(needed, str(model.device))
        if not short:
            return sizes[number:]
    frames = f"{counted(plan.sampling.frames, 'frame')} of {plan.width}x{plan.height} pixels"
    kept = f"{frames}, {encoder.keep:,} visual tokens kept"
    if other_tokens > TEXT:
        kept += f", {other_tokens:,} other tokens"
    raise OutOfMemory(f"{plan.name} {short}: {kept}", USE_LESS, stage="encode")


def check_carried(session: Session, plan: Plan) -> None:
    """Raises OutOfMemory where there is too little for what a window of a stream leaves to the next one (live/segments.py)."""
    model = session.loaded.model
    _, height, width = plan.encoder.grid
    needed = 2 * carried_bytes(model.config, height * width, model.dtype.itemsize)  # two windows' are held at once
    if plan.encoder.reuse and (short := shortage(needed, str(model.device))):
        raise OutOfMemory(f"a stream of {plan.width}x{plan.height} pixels {short}", USE_LESS, stage="encode")
