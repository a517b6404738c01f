"""The prompt of a question about videos and pictures, with subtitles, and whether it fits."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from evoprune.errors import DoesNotFit, UsageError
from evoprune.language import Prompt, Tokenizer, Turn, build_prompt, prompt_positions, timestamps
from evoprune.model import VisionConfig
from evoprune.session.loading.model import LoadedModel
from evoprune.session.memory import TEXT, check_memory, fitting_pieces
from evoprune.session.options import GenerationOptions, SamplingOptions
from evoprune.session.session import Session
from evoprune.util import brief, clock, counted
from evoprune.video import (
    NO_SUBTITLES,
    NOTHING_SAID,
    PICTURE,
    VIDEO,
    Plan,
    PromptSubtitles,
    SubtitleLine,
    Subtitles,
    check_picture,
    read_subtitles,
)


def fitting_prompt(
    session: Session,
    plans: Sequence[Plan],
    question: str,
    options: GenerationOptions,
    kept: int,
    earlier: Sequence[Turn] = (),
) -> Prompt:
    """Return the prompt of a question after `earlier` ones, with room for all visual tokens of the inputs, of which `kept` will
    be read.

    Raises UsageError: it does not fit into the model's context. OutOfMemory. ModelError: an unusable chat template.
    """
    loaded = session.loaded
    check_texts(loaded, question, options.system, earlier)
    vision = loaded.model.config.vision_config
    prompt = prompt_about(loaded.tokenizer, vision, plans, question, options.system, options.thinking, earlier)
    check_context(loaded, prompt.text_tokens, kept, options.max_new_tokens)
    check_memory(session, prompt.text_tokens, kept)
    return prompt


def prompt_subtitles(tokenizer: Tokenizer, plan: Plan, sampling: SamplingOptions) -> PromptSubtitles:
    """Return the subtitles of what is looked at of an input, in at most `max_subtitle_tokens` tokens.

    Errors: see `frames.read_subtitles`.
    """
    info = plan.info
    choice = sampling.subtitles
    if choice == NO_SUBTITLES:
        return NOTHING_SAID
    if info.kind == PICTURE:
        check_picture(info, choice)
        return PromptSubtitles(note=f"{info.path} is a picture")
    span = plan.full.sampling
    return fit(tokenizer, read_subtitles(info, choice, span.start_s, span.end_s), sampling.max_subtitle_tokens)


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


def positions_of(prompt: Prompt, plans: Sequence[Plan], loaded: LoadedModel) -> torch.Tensor:
    """Return the positions of a prompt about some inputs by Qwen's rule, int64 `[3, L]`."""
    pair = loaded.video.temporal_patch_size
    per_second = loaded.model.config.vision_config.tokens_per_second
    videos = []
    for place, plan in zip(prompt.places, plans, strict=True):
        videos += place.positions(plan.grid, plan.sampling.seconds_per_pair(pair), per_second)
    return prompt_positions(len(prompt.input_ids), videos)


def prompt_about(
    tokenizer: Tokenizer,
    vision: VisionConfig,
    plans: Sequence[Plan],
    question: str,
    system: str | None,
    thinking: bool = False,
    earlier: Sequence[Turn] = (),
) -> Prompt:
    """Return the prompt of a question about some inputs, after `earlier` ones.

    The subtitles of each of several inputs are under a line that says which it is.

    Errors: as of `language.prompt.build_prompt`.
    """
    if len(plans) == 1:
        subtitles = plans[0].subtitles.text
    else:
        videos = [plan.subtitles.text for plan in plans if plan.kind == VIDEO]
        subtitles = "".join(f"Video {number}:\n{text}" for number, text in enumerate(videos, 1) if text)
    times = []
    for plan in plans:
        before_pairs = []
        if vision.traits.timestamps and plan.kind == VIDEO:
            before_pairs = timestamps(plan.shown_s, vision.temporal_patch_size)
        times.append(before_pairs)
    inputs = [(plan.kind, plan.visual_tokens) for plan in plans]
    kwargs = {"system": system, "thinking": thinking, "earlier": earlier}
    return build_prompt(tokenizer, question, inputs, subtitles=subtitles, times=times, **kwargs)


def longest_prompt(
    session: Session,
    plans: Sequence[Plan],
    questions: Sequence[str],
    options: GenerationOptions,
    encoded: Collection[Plan] = (),
) -> int:
    """Tokens of text in the longest prompt of some questions about inputs, of which `encoded` are encoded already.

    Raises UsageError: a question does not fit into the model's context. OutOfMemory: what is to be encoded needs too much together
    with the prompt. ModelError: an unusable chat template.
    """
    for question in questions:
        check_texts(session.loaded, question, options.system)
    given = session.loaded.tokenizer, session.loaded.model.config.vision_config, plans
    beginning = options.system, options.thinking
    longest = max(prompt_about(*given, asked, *beginning).text_tokens for asked in questions)
    kept = sum(plan.encoder.keep for plan in plans)
    check_context(session.loaded, longest, kept, options.max_new_tokens)
    for plan in plans:
        other_tokens = max(TEXT, longest) + kept - plan.encoder.keep
        if other_tokens > TEXT and not any(plan is each for each in encoded):
            fitting_pieces(session, plan, other_tokens)
    return longest


def check_texts(loaded: LoadedModel, question: str, system: str | None = None, earlier: Sequence[Turn] = ()) -> None:
    """Raises DoesNotFit where the beginning of a text does not fit into the context: all of it might take minutes to split."""
    _check_beginning(loaded, question, "a question", "ask a shorter question")
    _check_beginning(loaded, system or "", "a system prompt", "give a shorter system prompt")
    said = "\n".join(text for turn in earlier for text in (turn.question, turn.answer))
    _check_beginning(loaded, said, "a conversation", "leave out what was said first")


def _check_beginning(loaded: LoadedModel, text: str, what: str, hint: str) -> None:
    """Raises DoesNotFit where the beginning of a text does not fit into the context. `what`, `hint`: for the error."""
    context = loaded.model.config.text_config.max_position_embeddings
    if not context:
        return
    beginning = text[: 8 * context]  # characters for each token
    # A cut word may take a few tokens more than the whole one, and prompt and answer have as many of their own.
    if len(beginning) < len(text) and len(loaded.tokenizer.encode(beginning)) > context:
        length = f"{what} of {len(text):,} characters"
        raise DoesNotFit(f"{length} does not fit into the {context:,} tokens of this model's context", hint)


def check_not_empty(question: Any) -> None:
    """Raises UsageError if a question is no text, or empty."""
    if not isinstance(question, str):
        raise UsageError(f"the question is {brief(question)}, not a text", 'for example "What happens?"')
    if not question.strip():
        raise UsageError("the question is empty", 'for example "What happens?"')


def check_context(loaded: LoadedModel, text: int, visual: int, new: int) -> None:
    """Raises DoesNotFit where a prompt, of `text` and `visual` tokens, and an answer of up to `new` do not fit into the context."""
    context = loaded.model.config.text_config.max_position_embeddings
    if context is not None and text + visual + new > context:
        raise DoesNotFit(
            f"{counted(text, 'token')} of text, {counted(visual, 'visual token')} and an answer of up to {counted(new, 'token')} "
            f"do not fit into the {context:,} tokens of this model's context",
            "ask a shorter question, or for a shorter answer (-n, max_new_tokens), keep fewer visual tokens (-b, budget) or "
            "subtitles (--max-subtitle-tokens, max_subtitle_tokens), or look at fewer frames (--max-frames, max_frames)",
        )
