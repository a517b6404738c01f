"""Whether questions about videos and pictures can be read, found out before these are encoded."""

from collections.abc import Collection, Sequence
from typing import Any

from evoprune.errors import LESS, OutOfMemory, UsageError
from evoprune.keywords import brief
from evoprune.language.demo_words import unknown_words
from evoprune.language.prompt import Prompt, build_prompt
from evoprune.language.tokenizer import Tokenizer
from evoprune.model.memory import language_bytes, shortage
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.loading.model import LoadedModel
from evoprune.pipeline.memory_check import TEXT, units_at_once
from evoprune.pipeline.options import GenerationOptions
from evoprune.pipeline.subtitles import subtitles_of
from evoprune.pipeline.view import View

BEGINNING = 8  # characters for each token of the context


def prompt_about(tokenizer: Tokenizer, views: Sequence[View], question: str, system: str | None) -> Prompt:
    """The prompt of a question about some inputs.

    Raises:
        As `language.prompt.build_prompt`.
    """
    inputs = [(view.kind, view.encoder.units) for view in views]
    subtitles = subtitles_of([(view.kind, view.subtitles) for view in views])
    return build_prompt(tokenizer, question, inputs, system=system, subtitles=subtitles)


def longest_prompt(
    engine: Engine,
    views: Sequence[View],
    questions: Sequence[str],
    options: GenerationOptions,
    encoded: Collection[View] = (),
) -> int:
    """Tokens of text in the longest prompt of some questions about some inputs.

    Args:
        encoded: those of `views` that are encoded already.

    Raises:
        UsageError: a question does not fit into the model's context. OutOfMemory: what is to be encoded needs too much together
            with the prompt. ModelError: an unusable chat template.
    """
    tokenizer = engine.loaded.tokenizer
    for question in questions:
        check_question(engine.loaded, question)
    longest = max(prompt_about(tokenizer, views, each, options.system).text_tokens for each in questions)
    kept = sum(view.encoder.keep for view in views)
    check_context(engine.loaded, longest, kept, options.max_new_tokens)
    for view in views:
        around = max(TEXT, longest) + kept - view.encoder.keep
        if around > TEXT and not any(view is each for each in encoded):
            units_at_once(engine, view, around)
    return longest


def check_question(loaded: LoadedModel, question: str) -> None:
    """Refuses a question that is far too long after a look at its beginning: all of it might take minutes to encode.

    Raises:
        UsageError: the beginning alone does not fit into the model's context.
    """
    context = loaded.model.config.text_config.max_position_embeddings
    beginning = question[: BEGINNING * context] if context else question
    # A cut word may take a few tokens more than the whole one, and prompt and answer have as many of their own.
    if len(beginning) < len(question) and len(loaded.tokenizer.encode(beginning)) > context:
        raise UsageError(
            f"a question of {len(question):,} characters does not fit into the {context:,} tokens of this model's context",
            "ask a shorter question",
        )


def check_not_empty(question: Any) -> None:
    """Raises UsageError if a question is no text, or empty."""
    if not isinstance(question, str):
        raise UsageError(f"the question is {brief(question)}, not a text", 'for example "What happens?"')
    if not question.strip():
        raise UsageError("the question is empty", 'for example "What happens?"')


def check_context(loaded: LoadedModel, text: int, visual: int, new: int) -> None:
    """Checks that a prompt and its answer fit into the model's context.

    Args:
        text, visual: tokens of the prompt, of its text and of the inputs after pruning.
        new: tokens of the answer, at most.

    Raises:
        UsageError: they do not fit.
    """
    context = loaded.model.config.text_config.max_position_embeddings
    if context is not None and text + visual + new > context:
        raise UsageError(
            f"{text:,} tokens of text, {visual:,} visual tokens and an answer of up to {new:,} tokens do not fit into the "
            f"{context:,} tokens of this model's context",
            "ask a shorter question, or for a shorter answer (-n, max_new_tokens), keep fewer visual tokens (-b, budget) or "
            "subtitles (--max-subtitle-tokens, max_subtitle_tokens), or look at fewer frames (--max-frames, max_frames)",
        )


def check_memory(engine: Engine, text: int, visual: int) -> None:
    """Checks that there is memory to read a prompt whose text is longer than the encoder's check of memory assumed.

    Args: `text`, `visual` as of `check_context`.

    Raises:
        OutOfMemory: there is too little.
    """
    if text <= TEXT:
        return
    model = engine.loaded.model
    needed = language_bytes(model.config, engine.prompt_columns(visual, text), model.dtype.itemsize)
    if short := shortage(needed, engine.loaded.device):
        raise OutOfMemory(f"a prompt of {text + visual:,} tokens {short}", LESS, stage="prefill")


def question_warnings(loaded: LoadedModel, question: str, known: Sequence[str]) -> list[str]:
    """Warnings about a question, by name, beside those that are `known` already.

    A demo model answers whatever it is asked. On a video of another kind no answer means anything, which is known then.
    """
    strange = loaded.demo and "demo_model" not in known and unknown_words(question, loaded.demo.world)
    return ["demo_question"] if strange else []
