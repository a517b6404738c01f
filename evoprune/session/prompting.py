"""Build the prompt of a question about videos and pictures, with subtitles, and check that it fits."""

from collections.abc import Collection, Sequence
from dataclasses import replace

import torch

from evoprune.errors import DoesNotFit
from evoprune.language import GenerationOptions, Prompt, Tokenizer, Turn, prompt_positions, timestamps
from evoprune.model import VisionConfig
from evoprune.session.loading.model import LoadedModel
from evoprune.session.memory import TEXT, check_memory, fitting_pieces
from evoprune.session.session import Session
from evoprune.util import counted
from evoprune.video import Plan, SamplingOptions, read_subtitles


def fitting_prompt(
    session: Session,
    plans: Sequence[Plan],
    question: str,
    options: GenerationOptions,
    kept: int,
    earlier: Sequence[Turn] = (),
) -> Prompt:
    """Return the prompt of a question, after checking that it fits into the context and into memory.

    The prompt has room for all visual tokens of the inputs.

    Args:
        kept: Number of visual tokens that the language model will read.
        earlier: The conversation so far.

    Raises:
        UsageError: If the prompt does not fit into the model's context.
        OutOfMemory: If it does not fit into memory.
        ModelError: If the chat template is unusable.
    """
    loaded = session.loaded
    check_texts(loaded, question, options.system, earlier)
    vision = loaded.model.config.vision_config
    prompt = prompt_about(loaded.tokenizer, vision, plans, question, options.system, options.thinking, earlier)
    check_context(loaded, prompt.text_tokens, kept, options.max_new_tokens)
    check_memory(session, prompt.text_tokens, kept)
    return prompt


def with_subtitles(tokenizer: Tokenizer, plan: Plan, sampling: SamplingOptions) -> Plan:
    """Return a plan with the subtitles of its time span, in at most `max_subtitle_tokens` tokens.

    Raises the same errors as `frames.read_subtitles`.
    """
    sampling.check_picture(plan.info)
    span = plan.full.sampling
    found = read_subtitles(plan.info, sampling.subtitles, span.start_s, span.end_s)
    fitted = found.fitted(sampling.max_subtitle_tokens, lambda text: len(tokenizer.encode(text)))
    return replace(plan, subtitles=fitted)


def positions_of(prompt: Prompt, plans: Sequence[Plan], loaded: LoadedModel) -> torch.Tensor:
    """Return the positions of a prompt by Qwen's rule, int64 `[3, L]`."""
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
    """Return the prompt of a question about one or several inputs.

    With several videos, a line with the number of the video precedes its subtitles. Raises the same errors as
    `language.prompt.Prompt.build`.

    Args:
        earlier: The conversation so far.
    """
    if len(plans) == 1:
        subtitles = plans[0].subtitles.text
    else:
        videos = [plan.subtitles.text for plan in plans if not plan.is_picture]
        subtitles = "".join(f"Video {number}:\n{text}" for number, text in enumerate(videos, 1) if text)
    times = []
    for plan in plans:
        before_pairs = []
        if vision.traits.timestamps and not plan.is_picture:
            before_pairs = timestamps(plan.shown_s, vision.temporal_patch_size)
        times.append(before_pairs)
    inputs = [(plan.kind, plan.visual_tokens) for plan in plans]
    kwargs = {"system": system, "thinking": thinking, "earlier": earlier}
    return Prompt.build(tokenizer, question, inputs, subtitles=subtitles, times=times, **kwargs)


def longest_prompt(
    session: Session,
    plans: Sequence[Plan],
    questions: Sequence[str],
    options: GenerationOptions,
    encoded: Collection[Plan] = (),
) -> int:
    """Return the number of text tokens in the longest prompt of several questions, after checking that all of them fit.

    Args:
        encoded: The plans of inputs that are already encoded, whose memory is not checked again.

    Raises:
        UsageError: If a question does not fit into the model's context.
        OutOfMemory: If encoding an input and reading the prompt need too much memory.
        ModelError: If the chat template is unusable.
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
    """Check that each text of a prompt is short enough to tokenize: tokenizing a huge text might take minutes.

    Raises:
        DoesNotFit: If the beginning of a text already exceeds the model's context.
    """
    _check_beginning(loaded, question, "a question", "ask a shorter question")
    _check_beginning(loaded, system or "", "a system prompt", "give a shorter system prompt")
    said = "\n".join(text for turn in earlier for text in (turn.question, turn.answer))
    _check_beginning(loaded, said, "a conversation", "leave out what was said first")


def _check_beginning(loaded: LoadedModel, text: str, what: str, hint: str) -> None:
    """Check that the beginning of a text fits into the model's context.

    Args:
        what: Name of the text for the error.
        hint: Hint for the error.

    Raises:
        DoesNotFit: If it does not fit.
    """
    context = loaded.model.config.text_config.max_position_embeddings
    if not context:
        return
    beginning = text[: 8 * context]  # 8 characters per token
    # Cutting a word may add a few tokens. That is harmless, because the rest of the prompt and the answer need as many.
    if len(beginning) < len(text) and len(loaded.tokenizer.encode(beginning)) > context:
        length = f"{what} of {len(text):,} characters"
        raise DoesNotFit(f"{length} does not fit into the {context:,} tokens of this model's context", hint)


def check_context(loaded: LoadedModel, text: int, visual: int, new: int) -> None:
    """Check that a prompt and its answer fit into the model's context.

    Args:
        text: Number of text tokens in the prompt.
        visual: Number of visual tokens in the prompt.
        new: Largest number of tokens in the answer.

    Raises:
        DoesNotFit: If they do not fit.
    """
    context = loaded.model.config.text_config.max_position_embeddings
    if context is not None and text + visual + new > context:
        raise DoesNotFit(
            f"{counted(text, 'token')} of text, {counted(visual, 'visual token')} and an answer of up to {counted(new, 'token')} "
            f"do not fit into the {context:,} tokens of this model's context",
            "ask a shorter question, or for a shorter answer (-n, max_new_tokens), keep fewer visual tokens (-b, budget) or "
            "subtitles (--max-subtitle-tokens, max_subtitle_tokens), or look at fewer frames (--max-frames, max_frames)",
        )
