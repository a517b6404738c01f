"""A question about a video as token ids, through the model's own chat template.

The user's words are only text: `<|im_end|>` or `<|video_pad|>` inside a question becomes ordinary tokens, so a question can
neither end its turn early nor fake a video. Only the template places special tokens.
"""

import re
from dataclasses import dataclass

import torch

from evoprune.errors import ModelError, OutOfMemory
from evoprune.language.text import check_text
from evoprune.language.tokenizer import Tokenizer

VIDEO_TOKEN = "<|video_pad|>"

# Placeholders for the user's words while the template is rendered. They have private-use characters, which no template has.
_QUESTION, _SYSTEM = "\ue000question\ue001", "\ue000system\ue001"


@dataclass(frozen=True)
class Prompt:
    """A prompt with room for every visual token of one video.

    Attributes:
        input_ids: int64 `[L]`.
        video_start: index of the first video placeholder.
        visual_tokens: N, the number of consecutive placeholders from there.
        prefix_length: number of leading ids that do not depend on the question, up to and including `<|vision_end|>`, and where
            possible the subtitles. Their keys and values serve every question about the same video (with the same system prompt).
    """

    input_ids: torch.Tensor
    video_start: int
    visual_tokens: int
    prefix_length: int

    @property
    def text_tokens(self) -> int:
        """Number of ids that are not video placeholders."""
        return len(self.input_ids) - self.visual_tokens


def build_prompt(
    tokenizer: Tokenizer, question: str, visual_tokens: int, *, system: str | None = None, subtitles: str = ""
) -> Prompt:
    """The prompt of one user turn: the video, then the subtitles and the question, up to where the answer begins.

    Args:
        tokenizer: with Qwen's special tokens and chat template.
        question: taken literally.
        visual_tokens: N of the unpruned video, at least 1.
        system: a system prompt, taken literally; None leaves it to the template.
        subtitles: what is said in the video, taken literally; the question follows without a space.

    Returns:
        The same ids as tokenising the rendered conversation at once, if the user's text holds no special token.

    Raises:
        ModelError: the chat template is broken, or does not write one video and then the question.
        UsageError: the question or the system prompt is not Unicode text (stray bytes from a shell).
        ValueError: `visual_tokens` is below 1.
    """
    if visual_tokens < 1:
        raise ValueError(f"a video has at least one visual token, not {visual_tokens}")
    specials = tokenizer.specials()
    rendered = _render(tokenizer, system is not None)
    before, _, after = rendered.partition(VIDEO_TOKEN)
    if VIDEO_TOKEN not in specials or VIDEO_TOKEN in after or _QUESTION in before or _QUESTION not in after:
        raise _unusable(tokenizer, "it does not write one video and then the question")

    words = {_QUESTION: subtitles + question, _SYSTEM: system or ""}
    check_text(question, system)
    ids, video_start, prefix_length = [], 0, 0
    # Split only at the template's special tokens, where the tokenizer splits too. The text between them is encoded as one
    # piece, so that merges across the edge of the user's text (a newline before it, say) are the same as in the whole.
    for piece in re.split(f"({'|'.join(map(re.escape, specials))})", rendered):
        if piece == VIDEO_TOKEN:
            video_start = len(ids)
            ids += [specials[piece]] * visual_tokens
        elif piece in specials:
            ids.append(specials[piece])
        else:
            # In one pass, so that a placeholder inside the user's words is not replaced.
            text = re.sub(f"{_QUESTION}|{_SYSTEM}", lambda match: words[match[0]], piece)
            encoded = tokenizer.encode(text)
            if _QUESTION in piece:
                prefix_length = len(ids) + _shared(tokenizer, encoded, piece.partition(_QUESTION)[0], subtitles)
            ids += encoded
    return Prompt(torch.tensor(ids, dtype=torch.int64, device="cpu"), video_start, visual_tokens, prefix_length)


def _shared(tokenizer: Tokenizer, encoded: list[int], before: str, subtitles: str) -> int:
    """How many ids of a text are those of what precedes the question in it; 0 if the question's beginning merges with that."""
    ids = tokenizer.encode(before + subtitles) if subtitles else []
    return len(ids) if encoded[: len(ids)] == ids else 0


def _render(tokenizer: Tokenizer, with_system: bool) -> str:
    """The conversation as text, with placeholders for the user's words."""
    messages = [{"role": "system", "content": _SYSTEM}] if with_system else []
    messages.append({"role": "user", "content": [{"type": "video"}, {"type": "text", "text": _QUESTION}]})
    try:
        return tokenizer.render(messages)
    except ValueError as problem:
        raise _unusable(tokenizer, str(problem)) from problem
    except OSError as problem:
        message = f"cannot start the process that renders the chat template: {problem.strerror}"
        raise OutOfMemory(message, "close other programs", stage="prefill") from problem


def _unusable(tokenizer: Tokenizer, reason: str) -> ModelError:
    where = f" ({tokenizer.template_file})" if tokenizer.template_file else ""
    return ModelError(
        f"the model's chat template cannot be used for video{where}: {reason}",
        "take tokenizer and chat template from the model that this one was made from",
    )
