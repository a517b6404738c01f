"""The prompt of a question about videos and pictures, and whether it fits."""

from collections.abc import Collection, Sequence
from typing import Any

import torch

from evoprune.errors import USE_LESS, DoesNotFit, OutOfMemory, UsageError
from evoprune.language.prompt import Prompt, Tokenizer, build_prompt, prompt_positions, timestamps
from evoprune.language.turns import Turn
from evoprune.model.config import VisionConfig
from evoprune.model.cost import language_bytes, shortage
from evoprune.session.loading.model import LoadedModel
from evoprune.session.options import GenerationOptions
from evoprune.session.planning import TEXT, fitting_pieces
from evoprune.session.session import Session
from evoprune.util import brief, counted
from evoprune.video.info import VIDEO
from evoprune.video.plan import Plan


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


def check_memory(session: Session, text: int, visual: int) -> None:
    """Raises OutOfMemory where there is too little to read a prompt whose text is longer than the encoder's check assumed."""
    if text <= TEXT:
        return
    model = session.loaded.model
    needed = language_bytes(model.config, session.prompt_columns(visual, text), model.dtype.itemsize)
    if short := shortage(needed, session.loaded.device):
        raise OutOfMemory(f"a prompt of {text + visual:,} tokens {short}", USE_LESS, stage="prefill")
