"""Build the prompt for a question about videos and images: apply the chat template, tokenize it, and compute M-RoPE positions.

This module uses the `tokenizers` library directly, because importing the transformers wrapper takes longer than generating a short
answer.

User input is always treated as plain text. If a question contains `<|im_end|>` or `<|video_pad|>`, they are encoded as ordinary
tokens, so a question cannot end its turn early or fake a video. Only the template can insert special tokens.
"""

import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from evoprune.errors import ModelError, UsageError, first_line, is_out_of_memory, process_error
from evoprune.language.components import check_components
from evoprune.language.template import render
from evoprune.language.turns import ASSISTANT, USER, Placed, Turn
from evoprune.methods import arange_on
from evoprune.untrusted import TEXT, check_fetched, read_object
from evoprune.util import check_text

# For each input type, its name in chat templates and the placeholder inserted by templates.
CONTENTS = {"video": ("video", "<|video_pad|>"), "picture": ("image", "<|image_pad|>")}
_PLACEHOLDERS = tuple(token for _, token in CONTENTS.values())
MARKERS = "<|vision_start|>", "<|vision_end|>"  # around placeholders
THOUGHTS = "<think>", "</think>"  # around reasoning text; some prompts end with the opening tag
# Placeholders for user text during template rendering. They contain private-use characters, which don't occur in templates.
_QUESTION = "\ue000question\ue001"
_SYSTEM = "\ue000system\ue001"
_EARLIER = "\ue000question {0}\ue001", "\ue000answer {0}\ue001"  # for earlier turns
_PART = "\ue000part {0}\ue001"  # for the text before each input in a `Placed`
_TEXT_PLACEHOLDER = re.compile("\ue000[a-z0-9 ]+\ue001")
_ANY_PLACEHOLDER = re.compile("|".join([*map(re.escape, _PLACEHOLDERS), _TEXT_PLACEHOLDER.pattern]))
# Qwen's files have up to 20 MB, 7 MB, 3 MB, and 3 kB.
MAX_BYTES = {"tokenizer.json": 2**25, "vocab.json": 2**25, "merges.txt": 2**25, "chat_template.jinja": 2**20}


def _bytes_of_characters() -> dict[str, int]:
    """Return the GPT-2 mapping from characters in a byte-level vocabulary to bytes.

    Printable Latin-1 characters map to their own codes. Characters starting at U+0100 map to the remaining bytes, in ascending
    order.
    """
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


PANIC = "PanicException"  # raised if the tokenizers library panics; not a subclass of Exception
_BYTES = _bytes_of_characters()


@dataclass
class Tokenizer:
    """A model's tokenizer and chat template."""

    backend: Any  # a `tokenizers.Tokenizer`
    chat_template: str  # Jinja source
    # Special tokens by their names in the tokenizer settings, such as "eos_token". Templates may refer to these names.
    named: dict[str, str] = field(default_factory=dict)
    template_file: str = ""  # template file, for error messages

    def __post_init__(self):
        self.backend.encode_special_tokens = True  # despite its name, this encodes special tokens as ordinary text
        # A tokenizer saved after training may still truncate and pad text for training batches.
        self.backend.no_truncation()
        self.backend.no_padding()

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Return True if a model folder contains tokenizer files."""
        return any(
            all((folder / name).is_file() for name in names)
            for names in (("tokenizer.json",), ("vocab.json", "merges.txt"))
        )

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Load the tokenizer and the chat template from a model folder.

        Raises:
            ModelError: If the tokenizer is missing, damaged, or unsupported, or there is no chat template.
        """
        if not cls.is_in(folder):
            hint = "copy tokenizer.json and tokenizer_config.json from the original model"
            raise ModelError(f"{folder} contains no tokenizer", hint)
        try:
            backend = _backend(folder)
            settings = _settings(folder / "tokenizer_config.json")
            template, source = _template(folder, settings)
        except BaseException as problem:  # the Rust parser raises plain Exceptions, and panics that are not Exceptions
            expected = isinstance(problem, Exception) or type(problem).__name__ == PANIC
            if not expected or isinstance(problem, ModelError) or is_out_of_memory(problem):
                raise
            message = f"the tokenizer in {folder} cannot be loaded: {first_line(problem)}"
            raise ModelError(message, "download its files again") from problem
        if not template:
            hint = "copy chat_template.jinja or chat_template.json from the original model"
            raise ModelError(f"the tokenizer in {folder} has no chat template", hint)
        return cls(backend, template, _named_tokens(settings), str(source))

    def specials(self) -> dict[str, int]:
        """Return the tokenizer's special tokens as a dict from token to ID."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Convert text to token IDs. Special tokens in the text are encoded as ordinary text.

        Raises:
            ModelError: If the tokenizer crashes, for example because matching a pattern takes too many steps.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except BaseException as problem:  # panics in Rust are not subclasses of Exception
            if type(problem).__name__ != PANIC:
                raise
            message = f"the model's tokenizer crashed: {first_line(problem)}"
            raise ModelError(message, "use the tokenizer of the original model", stage="prefill") from problem

    def decode(self, ids: list[int]) -> str:
        """Convert token IDs to text, omitting special tokens. Incomplete characters are replaced with U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def bytes_of(self, token: int) -> bytes:
        """Return the UTF-8 bytes of a token, which may be only part of a character, or no bytes for an unknown token ID."""
        if token in (added := self._added):
            return added[token].encode()
        text = self.backend.id_to_token(token) or ""
        if not _BYTES.keys() >= {*text}:  # not in the byte-level alphabet, so the decoder leaves it unchanged, too
            return text.encode()
        return bytes(_BYTES[character] for character in text)

    @cached_property
    def _added(self) -> dict[int, str]:
        """The text of each token added to the vocabulary, by token ID."""
        return {i: token.content for i, token in self.backend.get_added_tokens_decoder().items()}

    def render(self, messages: list[dict], thinking: bool = False) -> str:
        """Render a conversation using the chat template, up to the point where the model starts thinking or answering.

        Args:
            messages: The conversation, in chat template format.
            thinking: The value of the template's `enable_thinking` variable (see `can_switch_thinking`).

        Raises:
            ValueError: If the template is broken, rejects the messages, or exceeds its resource limits.
            OSError: If the rendering process cannot be started.
        """
        context = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        return render(self.chat_template, context | {"enable_thinking": thinking} | self.named)

    @property
    def can_switch_thinking(self) -> bool:
        """Whether thinking can be turned on and off using `enable_thinking`, as in Qwen3.5. Qwen3-VL-Thinking always thinks."""
        return "enable_thinking" in self.chat_template

    @cached_property
    def always_thinks(self) -> bool:
        """Whether the template inserts the opening `<think>` tag even if `enable_thinking` is False."""
        if THOUGHTS[0] not in self.chat_template:  # avoids starting a process to render the template
            return False
        try:
            return opens_thoughts(self.render([{"role": "user", "content": [{"type": "text", "text": "Why?"}]}]))
        except (ValueError, OSError):  # the error is reported later, when a prompt is built
            return False

    def video_columns(self, grid: tuple[int, int, int], times: Sequence[str] = ()) -> tuple[torch.Tensor, "Place"]:
        """Return the token IDs for a video in a prompt, int64 `[L]`, and the video's `Place` relative to these token IDs.

        Args:
            grid: (T, H, W), the number of frame pairs, unit rows, and unit columns.
            times: The timestamp before each frame pair, as returned by `timestamps`. With timestamps, each frame pair is also
                surrounded by markers.
        """
        specials = self.specials()
        start, pad, end = (specials[token] for token in (MARKERS[0], CONTENTS["video"][1], MARKERS[1]))
        units = grid[1] * grid[2]
        if times:
            words = [[*self.encode(text), start] for text in times]
            ids = [token for before in words for token in (*before, *[pad] * units, end)]
            place = Place.of_pairs([len(before) for before in words], units)
        else:
            ids = [pad] * units * grid[0]
            place = Place((range(len(ids)),))
        return torch.tensor(ids, dtype=torch.int64, device="cpu"), place


def opens_thoughts(prompt: str) -> bool:
    """Return True if a prompt ends with the opening `<think>` tag."""
    return prompt.rstrip().endswith(THOUGHTS[0])


def _named_tokens(settings: dict) -> dict[str, str]:
    """Extract the named tokens from the tokenizer settings, where each token is a string or an object with a `content` string."""
    named = {}
    for name, token in settings.items():
        if isinstance(token, dict):
            token = token.get("content")
        if name.endswith("_token") and isinstance(token, str):
            named[name] = token
    return named


def _backend(folder: Path):
    if (folder / "tokenizer.json").is_file():
        import tokenizers

        _check_size(folder / "tokenizer.json")
        content = (folder / "tokenizer.json").read_bytes()
        check_components(content)
        return tokenizers.Tokenizer.from_buffer(content)
    # If only vocab.json and merges.txt exist, transformers provides the rest of Qwen's tokenizer.
    from transformers import AutoTokenizer

    for name in ("vocab.json", "merges.txt"):
        _check_size(folder / name)
    backend = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer
    check_components(backend.to_str())
    return backend


def _check_size(file: Path) -> None:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file.name} is not a regular file")
    if file.stat().st_size > MAX_BYTES[file.name]:
        raise ValueError(f"{file.name} is larger than {MAX_BYTES[file.name] // 2**20} MiB")
    check_fetched(file)


def _settings(path: Path) -> dict:
    if not os.path.lexists(path):
        return {}
    check_fetched(path)
    return read_object(path)


def _template(folder: Path, settings: dict) -> tuple[str | None, Path]:
    """Return a model's chat template (None if there is no template) and the file that contains it.

    A separate template file takes precedence over settings files, which contain the template in older repositories. The processor
    settings take precedence over the tokenizer settings, because only the processor's template supports video.
    """
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        _check_size(file)
        return file.read_text(encoding="utf-8"), file
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if file.name != "tokenizer_config.json":
            template = _settings(file).get("chat_template")
        else:
            template = settings.get("chat_template")
        if isinstance(template, list):  # a list of named templates
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if template:
            return TEXT.check(template, f"{file.name}: chat_template"), file
    return None, file


def video_positions(
    grid: tuple[int, int, int], seconds_per_pair: float, tokens_per_second: float | None
) -> torch.Tensor:
    """Return the M-RoPE positions of a video's units, int64 `[3, T*H*W]`, in raster order and relative to the start of the video.

    Args:
        grid: (T, H, W), the number of frame pairs, unit rows, and unit columns. An image has one frame pair.
        seconds_per_pair: The time between consecutive frame pairs, ignored if there is only one frame pair.
        tokens_per_second: See `config.VisionConfig`.
    """
    t, h, w = grid
    # Multiply in float64 and round down only at the end, because rounding the step would cause the positions to drift.
    step = 1.0
    if tokens_per_second is not None:
        step = seconds_per_pair * tokens_per_second
    clock = (torch.arange(t, dtype=torch.float64, device="cpu") * step).floor().long()
    return torch.stack(torch.meshgrid(clock, arange_on(h, "cpu"), arange_on(w, "cpu"), indexing="ij")).flatten(1)


def prompt_positions(length: int, videos: Sequence[tuple[int, torch.Tensor]]) -> torch.Tensor:
    """Return the M-RoPE positions of an unpruned prompt, int64 `[3, length]` (Qwen2-VL, arXiv 2409.12191, section 2.1).

    A text token has the same position in time, height, and width. The positions of a video token are the time of its frame pair and
    the row and column of its unit, relative to the start position of the video. Text after a video continues at the largest
    position so far plus one, as does the first generated token after the prompt.

    Args:
        length: The number of columns in the prompt.
        videos: A tuple for each video and image, in order, with its first column and the result of `video_positions`.

    Raises:
        ValueError: If a video overlaps another video or doesn't fit into the prompt.
    """
    pieces = []
    at = 0
    following = 0
    for start, own in videos:
        tokens = own.shape[1]
        if start < at or start + tokens > length:
            raise ValueError(f"the video at column {start} with {tokens} tokens does not fit into the prompt")
        pieces.append((arange_on(start - at, "cpu") + following).expand(3, -1))
        following += start - at
        inside = own + following
        pieces.append(inside)
        following = int(inside.max()) + 1
        at = start + tokens
    pieces.append((arange_on(length - at, "cpu") + following).expand(3, -1))
    return torch.cat(pieces, dim=1)


@dataclass(frozen=True)
class Place:
    """The columns occupied by an input in a prompt."""

    runs: tuple[range, ...]  # placeholder columns: one run, or one run per frame pair, of equal length
    # The columns of each run, including its timestamp and markers. If none of a run's tokens are kept, all of these columns are
    # removed, as if the frame pair hadn't been sampled. Empty if the text around runs is never removed.
    around: tuple[range, ...] = ()

    @classmethod
    def of_pairs(cls, before: Sequence[int], units: int, *, start: int = 0, after: int = 1) -> "Place":
        """Create a `Place` for a video with a timestamp before each frame pair.

        Args:
            before: Number of text columns before each frame pair's tokens.
            units: Number of tokens per frame pair.
            start: First column of the video.
            after: Number of text columns after each frame pair's tokens.
        """
        runs = []
        around = []
        for text in before:
            runs.append(range(start + text, start + text + units))
            around.append(range(start, runs[-1].stop + after))
            start = around[-1].stop
        return cls(tuple(runs), tuple(around))

    def __len__(self) -> int:
        """Return the number of placeholder columns for this input."""
        return sum(map(len, self.runs))

    @cached_property
    def columns(self) -> torch.Tensor:
        """Indices of the prompt columns with this input's placeholders, int64 on the CPU."""
        return torch.cat([arange_on(len(run), "cpu") + run.start for run in self.runs])

    def positions(
        self, grid: tuple[int, int, int], seconds_per_pair: float, tokens_per_second: float | None
    ) -> list[tuple[int, torch.Tensor]]:
        """Return the first column and the M-RoPE positions of each run, in the format expected by `prompt_positions`.

        See `video_positions` for the arguments.
        """
        pairs = grid[0] // len(self.runs)
        inside = video_positions((pairs, *grid[1:]), seconds_per_pair, tokens_per_second)
        return [(run.start, inside) for run in self.runs]

    def left_out(self, kept: torch.Tensor) -> list[range]:
        """Return the column ranges to remove from the prompt because none of the tokens in their frame pairs are kept.

        Args:
            kept: Indices of the placeholders to keep, int64 on the CPU.
        """
        if not self.around:
            return []
        kept_per_run = torch.bincount(kept // len(self.runs[0]), minlength=len(self.runs))
        return [self.around[run] for run in (kept_per_run == 0).nonzero()[:, 0].tolist()]


def timestamps(times_s: Sequence[float], frames: int = 2) -> list[str]:
    """Return the timestamps to insert before frame pairs in prompts for Qwen3-VL and Qwen3.5.

    A frame pair's timestamp is the mean of the timestamps of its first and last frames.

    Args:
        times_s: Timestamps of the sampled frames, in seconds.
        frames: Number of frames per pair.

    Returns:
        One string per frame pair, such as `<1.5 seconds>`.

    Raises:
        ValueError: If the last pair is incomplete.
    """
    pairs = zip(*(times_s[first::frames] for first in (0, frames - 1)), strict=True)
    return [f"<{(first + last) / 2:.1f} seconds>" for first, last in pairs]


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt before pruning, with one placeholder per visual token."""

    input_ids: torch.Tensor  # int64 `[L]`
    places: tuple[Place, ...]  # one per input
    # Number of leading tokens that don't depend on the question. They extend at least to the last `<|vision_end|>`, and include the
    # subtitles if possible. Their keys and values can be reused for any question about the same inputs with the same system prompt.
    prefix_length: int
    # Number of tokens up to the end of the question. Later prompts in the same conversation start with these tokens.
    turn_length: int

    @classmethod
    def build(
        cls,
        tokenizer: Tokenizer,
        question: str,
        inputs: Sequence[tuple[str, int]],
        *,
        system: str | None = None,
        subtitles: str = "",
        times: Sequence[Sequence[str]] = (),
        thinking: bool = False,
        earlier: Sequence[Turn] = (),
    ) -> "Prompt":
        """Build the prompt for a question, up to the beginning of the answer.

        The prompt consists of the inputs in order, the subtitles, the earlier turns, and the question. If the question is a
        `Placed`, the last entries of `inputs` appear between its pieces of text.

        All strings are used literally, and the first question follows the subtitles without a space. If the strings contain no
        special tokens, the resulting token IDs are the same as when tokenizing the entire rendered conversation at once.

        Args:
            tokenizer: The model's tokenizer and chat template.
            question: The question to ask the model.
            inputs: A tuple for each input, with its type ("video" or "picture") and its number of visual tokens before pruning (at
                least 1).
            system: The system prompt. None means the template's default.
            subtitles: Text that precedes the first question.
            times: The timestamps before each input's frame pairs, as returned by `timestamps`. With timestamps, each frame pair is
                also surrounded by markers. For an input without timestamps, pass an empty sequence; its placeholders form a single
                run.
            thinking: See `Tokenizer.render`.
            earlier: The earlier turns of the conversation, in order. All inputs belong to the first question, except for inputs
                inside a `Placed`.

        Raises:
            ModelError: If the chat template is broken, or doesn't output the inputs in order, followed by the conversation.
            UsageError: If a string isn't valid Unicode (stray bytes from a shell), or the template doesn't support a system prompt
                or thinking.
            ValueError: If there are no inputs, an input has no tokens, or there are more places than inputs.
        """
        if not inputs or min(count for _, count in inputs) < 1:
            raise ValueError(f"a prompt needs inputs with at least one visual token each, not {list(inputs)}")
        specials = tokenizer.specials()
        markers = MARKERS if any(times) else ()
        kinds = [kind for kind, _ in inputs]
        contents, texts = _lay_out(question, earlier, len(inputs))
        flat = [part for content in contents for part in content]
        after_inputs = flat[len(flat) - flat[::-1].index(None)]  # the text after the last input
        rendered = _render(tokenizer, kinds, system is not None, markers, thinking, contents)
        if thinking and not (tokenizer.can_switch_thinking or opens_thoughts(rendered)):
            problem = "this model's chat template does not support thinking"
            raise UsageError(
                problem, "leave out --think (think), or use a model that thinks, such as Qwen3.5 or Qwen3-VL-Thinking"
            )
        if system and _SYSTEM not in rendered:
            problem = "the model's chat template has no place for a system prompt"
            raise UsageError(problem, "leave it out, or write it in the question")
        check_text(question, system, *_texts(earlier))
        words = texts | {after_inputs: subtitles + texts[after_inputs], _SYSTEM: system or ""}
        times_of = times or [()] * len(inputs)
        # Number of placeholders in each run. Inputs with timestamps have one run per timestamp.
        lengths = (
            count // (len(own) or 1) for (_, count), own in zip(inputs, times_of, strict=True) for _ in own or [""]
        )
        ids = []
        runs = []
        prefix_length = 0
        turn_length = 0
        # Split only at the template's special tokens, because the tokenizer also splits there. The text between two special tokens
        # is encoded at once, so that user text merges with surrounding template text (such as a newline) in the same way as when
        # encoding the entire prompt at once.
        for piece in re.split(f"({'|'.join(map(re.escape, specials))})", _with_times(rendered, times_of)):
            if piece in _PLACEHOLDERS:
                runs.append(range(len(ids), len(ids) + next(lengths)))
                ids += [specials[piece]] * len(runs[-1])
            elif piece in specials:
                ids.append(specials[piece])
            else:
                # Substitute in a single pass, so that placeholders in user text aren't replaced.
                text = _TEXT_PLACEHOLDER.sub(lambda match: words[match[0]], piece)
                encoded = tokenizer.encode(text)
                if after_inputs in piece:
                    prefix_length = len(ids)
                    if subtitles:
                        before = tokenizer.encode(piece.partition(after_inputs)[0] + subtitles)
                        if (
                            encoded[: len(before)] == before
                        ):  # False if the subtitles and the beginning of the question merge into one token
                            prefix_length += len(before)
                ids += encoded
                if _QUESTION in piece:
                    turn_length = len(ids)
        places = tuple(_places(tokenizer, ids, runs, times_of))
        return cls(torch.tensor(ids, dtype=torch.int64, device="cpu"), places, prefix_length, turn_length)

    @property
    def visual_tokens(self) -> int:
        """Total number of visual tokens before pruning, which is the number of placeholders."""
        return sum(map(len, self.places))

    @property
    def text_tokens(self) -> int:
        """Number of text (non-placeholder) tokens. Pruning may remove some of them (see `Place.around`)."""
        return len(self.input_ids) - self.visual_tokens


def _texts(turns: Sequence[Turn]) -> list[str]:
    return [text for turn in turns for text in (turn.question, turn.answer)]


def _lay_out(question: str, earlier: Sequence[Turn], inputs: int) -> tuple[list[list[str | None]], dict[str, str]]:
    """Split the messages of a conversation into pieces of text and inputs.

    Inputs outside a `Placed` come first. Each message ends with a piece of text, which may be empty.

    Returns:
        A tuple of the messages and a dictionary that maps placeholders to pieces of text. Each message is a list with a placeholder
        for each piece of text and None for each input.
    """
    names = [*(name.format(turn) for turn in range(len(earlier)) for name in _EARLIER), _QUESTION]
    messages = [text.parts if isinstance(text, Placed) else (text,) for text in (*_texts(earlier), question)]
    front = inputs - sum(part is None for parts in messages for part in parts)
    if front < 0:
        raise ValueError(f"the texts have places for {inputs - front} inputs, but there are {inputs}")
    contents = []
    words = {}
    for name, parts in zip(names, messages, strict=True):
        *before, last = parts if parts and parts[-1] is not None else (*parts, "")
        content: list[str | None] = [] if contents else [None] * front
        for part in before:
            place = None if part is None else _PART.format(len(words))
            if place is not None:
                words[place] = part
            content.append(place)
        words[name] = last
        contents.append([*content, name])
    return contents, words


def _with_times(rendered: str, times: Sequence[Sequence[str]]) -> str:
    """Replace each placeholder that has timestamps with its timestamps, each followed by a placeholder between markers."""
    remaining_times = iter(times)
    start, end = map(re.escape, MARKERS)

    def runs(match: re.Match) -> str:
        return "".join(f"{time}{match[1].join(MARKERS)}" for time in next(remaining_times)) or match[0]

    return re.sub(f"(?:{start})?({'|'.join(map(re.escape, _PLACEHOLDERS))})(?:{end})?", runs, rendered)


def _places(tokenizer: Tokenizer, ids: list[int], runs: list[range], times: Sequence[Sequence[str]]) -> Iterator[Place]:
    """Yield one `Place` per input. `runs` contains all placeholder columns, in the order of the inputs."""

    def around(run: range, time: str) -> range:
        """Return the columns of a run, its markers, and its timestamp, unless the timestamp merged with the preceding text."""
        own = tokenizer.encode(time)
        start = run.start - 1
        if ids[start - len(own) : start] == own:
            start -= len(own)
        return range(start, run.stop + 1)

    left = iter(runs)
    for own_times in times:
        own = tuple(islice(left, max(1, len(own_times))))
        yield Place(own, tuple(around(run, time) for run, time in zip(own, own_times, strict=False)))


def _render(
    tokenizer: Tokenizer,
    kinds: Sequence[str],
    with_system: bool,
    markers: Sequence[str],
    thinking: bool,
    contents: Sequence[Sequence[str | None]],
) -> str:
    """Render a conversation with placeholders for user text, and check that everything is in the right order.

    Args:
        tokenizer: The tokenizer and its chat template.
        kinds: The type of each input ("video" or "picture").
        with_system: Whether to include a system prompt.
        markers: Special tokens that the tokenizer must define.
        thinking: See `Tokenizer.render`.
        contents: The messages as returned by `_lay_out`.

    Raises:
        ModelError: If the template cannot be used.
    """
    messages = []
    if with_system:
        messages.append({"role": "system", "content": _SYSTEM})
    left = iter(kinds)
    expected = []  # expected placeholders for inputs and text, in order
    for number, content in enumerate(contents):
        parts = []
        for part in content:
            kind, token = ("text", part) if part is not None else CONTENTS[next(left)]
            parts.append({"type": kind, "text": part} if part is not None else {"type": kind})
            expected.append(token)
        role = (USER, ASSISTANT)[number % 2]
        messages.append({"role": role, "content": content[0] if role == ASSISTANT else parts})
    try:
        rendered = tokenizer.render(messages, thinking)
        written = [each for each in _ANY_PLACEHOLDER.findall(rendered) if each != _SYSTEM]
        inputs = [token for token in expected if token in _PLACEHOLDERS]
        missing = {*inputs, *markers} - tokenizer.specials().keys()
        if missing or inputs != [token for token in written if token in _PLACEHOLDERS]:
            raise ValueError("it does not write the inputs in order")
        # If a single question follows the inputs, the template may repeat it.
        if written != expected and (len(expected) > len(inputs) + 1 or written[: len(expected)] != expected):
            raise ValueError("it does not write the messages in order after the inputs")
    except ValueError as problem:
        where = f" ({tokenizer.template_file})" if tokenizer.template_file else ""
        hint = "use the tokenizer and the chat template of the original model"
        raise ModelError(f"the model's chat template cannot be used{where}: {problem}", hint) from problem
    except OSError as problem:
        raise process_error("start the process that renders the chat template", problem, "prefill") from problem
    return rendered
