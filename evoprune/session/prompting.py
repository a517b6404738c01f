"""Build the prompt for a question about videos and images, with or without subtitles."""

from collections.abc import Sequence
from dataclasses import replace

from evoprune.language import Prompt, Tokenizer, Turn, timestamps
from evoprune.model import VisionConfig
from evoprune.session.options import ModelOptions
from evoprune.video import Plan, SamplingOptions, read_subtitles


def with_subtitles(
    tokenizer: Tokenizer, plan: Plan, sampling: SamplingOptions, options: ModelOptions | None = None
) -> Plan:
    """Return a copy of a plan with the subtitles in its time span, truncated to at most `max_subtitle_tokens` tokens.

    Raises the same errors as `frames.read_subtitles`.
    """
    sampling.check_picture(plan.info)
    span = plan.full.sampling
    found = read_subtitles(plan.info, sampling.subtitles_wanted, span.start_s, span.end_s)
    fitted = found.fitted(sampling.max_subtitle_tokens, lambda text: len(tokenizer.encode(text)))
    plan = replace(plan, subtitles=fitted)
    if options is None or sampling.speech == "none":
        return plan
    from evoprune.session.speech import with_speech

    return with_speech(tokenizer, plan, sampling, options)


def prompt_about(
    tokenizer: Tokenizer,
    vision: VisionConfig,
    plans: Sequence[Plan],
    question: str,
    system: str | None,
    thinking: bool = False,
    earlier: Sequence[Turn] = (),
) -> Prompt:
    """Return the prompt for a question about one or more inputs.

    If there are multiple inputs, each video's subtitles start with a line containing the video number. Raises the same errors as
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
    return Prompt.build(
        tokenizer,
        question,
        inputs,
        subtitles=subtitles,
        times=times,
        system=system,
        thinking=thinking,
        earlier=earlier,
    )
