"""Dataclasses that record a question, its answer, and all measurements, and the texts of warnings.

They can be converted to and from JSON, and statistics.py formats them as text. The JSON schema is `evoprune/answer@1`, and
docs/json.md describes its fields. New fields may be added, but existing fields are never removed. Unknown values are None, times
are in milliseconds, and sizes are in bytes.
"""

import json
import os
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, ClassVar

from evoprune.files import cache_folder
from evoprune.suggestions import Suggesting
from evoprune.util import WIDTH, clock, listed, shown

SCHEMA = "evoprune/answer@1"
# Reasons for an empty report of a Hugging Face model call, by warning name.
EMPTY_REASONS = {
    "not_active": "pruning is not active: call the model inside `with` or after evoprune.apply",
    "no_video": "no video in this call",
    "pictures_only": "images are not pruned without pictures=True",
    "own_code": "the model's own code encoded the video",
}
# Characters in file names or answers that can cause a terminal to display misleading text: control characters allowed in JSON
# strings, and Unicode marks that change the text direction or break lines.
INVISIBLE = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

UNROUNDED = ("parsed", "schema")  # these fields contain data rather than measurements
# The time during which reading and preprocessing overlapped with other work. It is reported like a stage but isn't one.
OVERLAP = "overlap"
# Stages that read and encode an input. Only the first question about each input has to wait for them.
INPUT_STAGES = ("plan", "speech", "read", "preprocess", "compile", "encode", "store", OVERLAP)
UNREAD = "not read yet; answer.text reads it"
DEMO_KNOWLEDGE = (
    "the demo models know only generated clips (demo: colored shapes and digits; demo-scenes: crowded scenes with "
    "signs)"
)
EQUAL_SCORES = "equal_scores"  # warning that all units of a video have the same score
WARNINGS = {
    "whole_picture": "{video} is not pruned: this method keeps or drops whole frames, and an image has only one",
    "pictures_whole": "images are not pruned without pictures=True; pruning counts cover only the videos",
    EQUAL_SCORES: "{video} shows only flat colors, so pruning had nothing to go by",
    "random_weights": "the weights are random, so the answer is meaningless; times and counts are valid for these dimensions",
    "cache_not_written": "the encoded video could not be stored: is the cache folder (by default {cache}) full or read-only?",
    "weights_not_stored": "the quantized weights are not kept on disk, so every start quantizes them again. The cache folder (by "
    "default {cache}) must be writable and have 8 GiB more than twice their size free, or their size with --store-quantized "
    "(store_quantized); it keeps up to 32 GiB of weights. --no-store turns this warning off",
    "damaged_subtitles": "some lines or characters of the subtitles cannot be read and were left out or replaced; is their text "
    "UTF-8, and are their times written correctly?",
    "subtitles_encoding": "the subtitle file is not UTF-8 and was read as Windows-1252; if letters are wrong, save it as UTF-8",
    "damaged_video": "{video} is damaged ({damaged:,} of its packets or images); each frame that cannot be decoded was "
    "replaced by the previous one",
    "cut_short": "{video} breaks off at {ends}, although its file states a length of {stated}",
    "hdr_video": "{video} is HDR, mapped to SDR",
    "interlaced_video": "{video} is interlaced, and was deinterlaced",
    "stretched_video": "{video} states pixels that are more than ten times as wide as high, or as high as wide, so they are read "
    "as square. If it looks wrong, ffmpeg -i IN -aspect 16:9 -c copy OUT sets another shape",
    "other_tracks": "{video} has several video tracks: the default one is read, or else the largest. ffmpeg -map extracts another",
    "changing_size": "the frame size of {video} changes: all frames are read at the size of the first, and other shapes get black "
    "borders",
    "guessed_rate": "{video} does not state its frame rate and is read at 25 frames per second; if that is wrong, so are all "
    "times. ffmpeg -r RATE -i IN -c copy OUT.mp4 sets it",
    "clock_gap": "the timestamps of {video} jump ahead by {gap}; later frames are read as if nothing were missing. If something "
    "is, times after the jump are too early by {gap}",
    "joined_files": "{video} contains another file after the first one, as if joined with cat; everything after the first may be "
    "missing or misplaced. ffmpeg -f concat joins videos",
    "sound_ignored": "the sound of {video} is not read, so an answer about it comes only from the images; --subtitles (in "
    "Python subtitles) reads a file with the spoken words, and --speech (speech) transcribes them",
    "no_sound": "{video} has no sound, so there is no speech to transcribe",
    "damaged_sound": "some of the sound of {video} cannot be decoded; what is said there is missing",
    "limited": "fewer or smaller frames were read than --fps or --frames ask for; the limits are --max-frames and "
    "--max-visual-tokens",
    "answer_cut": "the answer may be incomplete: it reached the token limit, -n (max_new_tokens)",
    "history_cut": "the conversation no longer fits into the model's context, so its oldest turns were left out",
    "thoughts_cut": "the model was still thinking when it reached the token limit, -n (max_new_tokens), so there is no answer",
    "thoughts_only": "the model stopped while it was still thinking, so there is no answer",
    "always_thinks": "this model always thinks before it answers; -n (max_new_tokens) counts its thoughts too",
    "demo_model": f"{DEMO_KNOWLEDGE}; {{answers}} meaningless. For a real answer: --model=Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_untold": f"{DEMO_KNOWLEDGE}; the format of {{video}} does not show whether it is one of these. If it is not, do not "
    "trust any answer about it. For other videos: --model=Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_inputs": "the demo models were trained without subtitles and on few inputs at a time (demo: one video; demo-scenes: "
    "up to two videos or images); do not rely on answers about anything else",
    "demo_question": "a question contains words that the demo model was not trained on; do not rely on its answer. "
    "samples/questions.jsonl has questions for demo, and docs/demo-model.md some for demo-scenes",
    "demo_schema": "the demo models were not trained to write JSON, so the answer to --schema is meaningless. "
    "For a real answer: --model=Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_history": "the demo models were trained on single questions and answer follow-up questions less accurately "
    "(docs/limits.md)",
    "demo_overlay": f"{DEMO_KNOWLEDGE}; what the model merges or drops in {{video}} means little. For a real model: "
    "--model=Qwen/Qwen2.5-VL-3B-Instruct",
}
NOTES = ("hdr_video", "interlaced_video", "other_tracks", "sound_ignored")  # warnings that usually need no action
# English words that suggest a question about the audio.
ABOUT_SOUND = re.compile(
    r"\b(say(s|ing)?|said|speak(s|ing|er|ers)?|spoken?|speech|talk(s|ed|ing)?|voices?|hear(s|d|ing)?|listen(s|ed|ing)?|sounds?"
    r"|sing(s|ing|er)?|sang|songs?|music|audio|nois(e|es|y)|loud(ly|er)?)\b",
    re.IGNORECASE,
)


@dataclass
class EncodingTimes:
    """Time spent on encoding, in seconds."""

    stages: dict[str, float] = field(default_factory=lambda: dict.fromkeys(INPUT_STAGES, 0.0))
    wall: float = 0.0
    prune: float = 0.0  # portion of the "encode" stage spent on scoring, merging, and selecting

    def add(self, other: "EncodingTimes") -> None:
        for stage in self.stages:
            self.stages[stage] += other.stages.get(stage, 0.0)
        self.wall += other.wall
        self.prune += other.prune


@dataclass
class VideoFacts:
    path: str | None = None
    duration_s: float | None = None
    width: int | None = None
    height: int | None = None
    rotation_deg: int | None = None
    codec: str | None = None
    fps: float | None = None
    variable_rate: bool | None = None
    frames_total: int | None = None
    decoder: str | None = None
    stated_s: float | None = None
    damaged: int | None = None
    rate_guessed: bool | None = None
    clock_gap_s: float | None = None


@dataclass
class Sampling:
    start_s: float | None = None
    end_s: float | None = None
    frames: int | None = None
    timestamps_s: list[float] | None = None
    resized_hw: list[int] | None = None
    grid_thw: list[int] | None = None  # in patches, as in Hugging Face processors
    seconds_per_pair: float | None = None
    seek: str | None = None  # "exact", or "keyframes" if any frame was replaced by a nearby keyframe
    read_s: list[float] | None = None  # timestamps of the frames actually read


@dataclass
class Pruning:
    """An answer's pruning settings and the number of visual tokens remaining after each step.

    All fields are None until the inputs have been encoded, and stay None if an error occurs before that.

    Attributes:
        method: Method name.
        args: All method settings, by name.
        budget: The requested budget, as a number or a name. With "auto" and "auto:inflection", the kept fraction depends on the
            video content.
        kept_ratio: Fraction of visual tokens kept, from 0 to 1.
        visual_tokens_in: Number of visual tokens before pruning.
        visual_tokens_kept: Number of visual tokens after pruning.
        encoder_rows: Number of rows after the vision tower's last layer.
        encoder_live_share: Share of the encoder computed, averaged over its layers, from 0 to 1.
        layers: A pair for each vision tower layer: the layer number and the number of rows computed.
        kept_per_pair: Number of tokens kept in each frame pair.
        positions: The code that computes the kept tokens' positions: "qwen" (evoprune) or "host" (the Hugging Face model).
        language_layers: A pair for each language model layer: the layer number and the number of visual tokens it read. None unless
            the method drops tokens inside the language model.
        language_work: Like `language_layers`, but with separate counts for keys and values, queries and output, and the MLP. None
            unless the method skips some of these operations.
        after_tower_below: On this device, inputs with fewer visual tokens than this are pruned only after the tower. None if the
            input size makes no difference.
        after_tower_inputs: Number of inputs pruned only after the tower. None if `after_tower_below` is None.
    """

    method: str | None = None
    args: dict[str, Any] | None = None
    budget: float | str | None = None
    kept_ratio: float | None = None
    visual_tokens_in: int | None = None
    visual_tokens_kept: int | None = None
    encoder_rows: int | None = None
    encoder_live_share: float | None = None
    layers: list[list[int]] | None = None
    kept_per_pair: list[int] | None = None
    positions: str | None = None
    language_layers: list[list[int]] | None = None
    language_work: list[list[int]] | None = None
    after_tower_below: int | None = None
    after_tower_inputs: int | None = None


@dataclass
class InputTimes:
    """Time spent in each stage for a single input, in milliseconds. See `Times`."""

    read: float | None = None
    preprocess: float | None = None
    encode: float | None = None
    encode_prune: float | None = None
    plan: float | None = None
    compile: float | None = None
    store: float | None = None
    overlap: float | None = None
    speech: float | None = None


@dataclass
class InputFacts:
    """Facts about a single video or image input of a question.

    `time_ms` includes the time spent encoding the input, even if it was encoded for an earlier question. `warnings` contains only
    the warnings for this input.
    """

    path: str | None = None
    kind: str | None = None
    video: VideoFacts = field(default_factory=VideoFacts)
    sampling: Sampling = field(default_factory=Sampling)
    pruning: Pruning = field(default_factory=Pruning)
    time_ms: InputTimes = field(default_factory=InputTimes)
    cache: str | None = None
    subtitles: dict[str, Any] | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass
class TokenCounts:
    """Token counts of the prompt and the answer. All counts are None until the model has read the question.

    Attributes:
        text: Number of text tokens in the prompt, including the chat template and subtitles.
        visual: Number of visual tokens in the prompt after pruning.
        prompt: Total number of prompt tokens: the sum of `text` and `visual`.
        new: Number of tokens generated so far, including thinking tokens. Always None for Hugging Face models.
    """

    text: int | None = None
    visual: int | None = None
    prompt: int | None = None
    new: int | None = None


@dataclass
class Times:
    """Time spent in each stage, in milliseconds.

    The stages before `generate`, minus `overlap`, add up to the time to first token, `ttft_wall`.
    """

    startup: float | None = None  # from the start of the process until loading the model begins
    load: float | None = None
    load_tokenizer: float | None = None
    load_weights: float | None = None
    load_prepare: float | None = None
    read: float | None = None
    preprocess: float | None = None
    encode: float | None = None
    encode_prune: float | None = None
    prefill: float | None = None
    generate: float | None = None
    pack: float | None = None
    total: float | None = None
    ttft_model: float | None = None
    ttft_wall: float | None = None
    prefill_prune: float | None = None
    plan: float | None = None
    compile: float | None = None
    store: float | None = None
    overlap: float | None = None
    speech: float | None = None


@dataclass
class Rate:
    generate_tok_s: float | None = None


@dataclass
class Memory:
    """Memory sizes in bytes.

    `peak_bytes` includes pages of memory-mapped files, which the operating system can evict at any time. `own_bytes` is the memory
    usage of the process without these pages.
    """

    weights_bytes: int | None = None
    peak_bytes: int | None = None
    own_bytes: int | None = None
    mapped_bytes: int | None = None


@dataclass
class ModelFacts:
    id: str | None = None
    revision: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    load_format: str | None = None
    engine: str | None = None

    @property
    def precision(self) -> str:
        """Dtype and quantization as shown in tables, such as "fp32 int8"."""
        return precision(self.dtype, self.quantize)


def precision(dtype: str | None, quantize: str | None) -> str:
    """Return the dtype, followed by the quantization if any, as in "fp32" or "fp32 int8"."""
    if quantize in (None, "none"):
        return str(dtype)
    return f"{dtype} {quantize}"


@dataclass
class Environment:
    evoprune: str | None = None
    torch: str | None = None
    transformers: str | None = None
    device_name: str | None = None
    threads: int | None = None


@dataclass
class Report(Suggesting):
    """The record of a question: the answer or the error, together with all measurements.

    `inputs` contains the facts about each input. With a single input, `video`, `sampling`, `pruning`, and `subtitles` repeat the
    values from its entry. With several inputs, `pruning` covers all of them together, and the other three fields are empty.
    """

    MEANT: ClassVar = {
        **dict.fromkeys(("time", "times", "timings"), "report.time_ms"),
        **dict.fromkeys(("kept", "visual_tokens_kept"), "report.pruning.visual_tokens_kept"),
        "text": "report.answer",
    }

    schema: str = SCHEMA
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_utc: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    question: str | None = None
    answer: str | None = None
    thoughts: str | None = None  # the reasoning generated before the answer
    finish_reason: str | None = None
    video: VideoFacts = field(default_factory=VideoFacts)
    sampling: Sampling = field(default_factory=Sampling)
    pruning: Pruning = field(default_factory=Pruning)
    tokens: TokenCounts = field(default_factory=TokenCounts)
    time_ms: Times = field(default_factory=Times)
    rate: Rate = field(default_factory=Rate)
    memory: Memory = field(default_factory=Memory)
    model: ModelFacts = field(default_factory=ModelFacts)
    generation: dict[str, Any] = field(default_factory=dict)
    env: Environment = field(default_factory=Environment)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, Any] | None = None
    compare: "Report | None" = None
    agreement: dict[str, Any] | None = None
    cache: str | None = None
    batch: dict[str, Any] | None = None
    subtitles: dict[str, Any] | None = None
    inputs: list[InputFacts] = field(default_factory=list)
    stream: dict[str, Any] | None = None
    conversation: dict[str, int] | None = None
    stop_reason: str | None = None  # the stop string that ended generation
    logprobs: list[dict[str, Any]] | None = None  # for each answer and thinking token
    parsed: Any = None  # data parsed from an answer that follows a schema
    choices: list[dict[str, Any]] | None = None  # each possible answer with its probability

    def __str__(self) -> str:
        """Return the statistics and warnings as text, in the command line's format."""
        from evoprune.statistics import stats_block

        stats = stats_block(self)
        if not stats:
            return repr(self)
        unread = [f"{'answer':<11}{UNREAD}"] if self.is_unread else []
        return "\n".join([*unread, *stats, *warning_lines(self)])

    @property
    def is_unread(self) -> bool:
        """Whether nothing of the answer has been generated yet. It is generated while the caller reads it."""
        return self.question is not None and (self.answer or self.finish_reason or self.error) is None

    def __repr__(self) -> str:
        pruning = self.pruning
        first = self.time_ms.ttft_wall
        facts = [
            f"{name} {getattr(self, name)!r}" for name in ("question", "answer") if getattr(self, name) is not None
        ]
        if self.is_unread:
            facts.append(UNREAD)
        if self.error:
            facts.append(f"error {self.error['message']!r}")
        if pruning.visual_tokens_kept is not None:
            facts.append(f"{pruning.visual_tokens_kept:,} of {pruning.visual_tokens_in:,} visual tokens")
        if first is not None:
            facts.append(f"first token {first:,.0f} ms")
        empty = ["empty", *(EMPTY_REASONS[name] for name in self.warnings if name in EMPTY_REASONS)]
        return f"<Report: {', '.join(facts) or ': '.join(empty)}>"

    def to_json(self, ascii_only: bool = False) -> str:
        """Return the record as a single line of compact JSON.

        Args:
            ascii_only: Escape all non-ASCII characters. Otherwise, only invisible characters are escaped.
        """
        return record_line(asdict(self), ascii_only)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Parse a report from the JSON returned by `to_json`. Fields added in later versions of evoprune are ignored.

        Raises:
            ValueError: If the text isn't valid JSON, or the record has a different schema.
        """
        return cls._from_record(json.loads(text))

    @classmethod
    def _from_record(cls, record: Any) -> "Report":
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"not a record of {SCHEMA}")
        report = _fill(cls(), record)
        if report.compare is not None:
            report.compare = cls._from_record(report.compare)
        if not isinstance(report.inputs, list):
            raise ValueError("inputs is not a list")
        report.inputs = [_fill(InputFacts(), facts) for facts in report.inputs]
        return report


def _fill(target, record: Any, name: str = "a record"):
    """Fill a dataclass and its nested dataclasses from a parsed JSON record. Unknown fields in the record are ignored."""
    if not isinstance(record, dict):
        raise ValueError(f"{name} is not an object")
    for field_, value in record.items():
        current = getattr(target, field_, None)
        if hasattr(current, "__dataclass_fields__"):
            _fill(current, value, field_)
        elif field_ in target.__dataclass_fields__:
            setattr(target, field_, value)
    return target


def name_inputs(report: Report, names: Sequence[str]) -> None:
    """Add inputs to a report when only their names are known. Long names are shortened."""
    names = [shown(name) for name in names]
    report.inputs = [InputFacts(path=name, video=VideoFacts(path=name)) for name in names]
    if len(names) == 1:
        report.video = VideoFacts(path=names[0])


def rounded(value):
    """Return a copy of plain data with all floats rounded to six decimal places.

    This rounds times in seconds to microseconds, and times in milliseconds to nanoseconds.
    """
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {k: v if k in UNROUNDED else rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


def warning_lines(report: Report) -> list[str]:
    """Return the text of a report's warnings as lines of at most `WIDTH` columns."""
    from evoprune.statistics import wrap_line

    texts = (f"{warning_title(name):<11}{warning_text(name, video)}" for name, video in warned(report))
    return [piece for text in texts for piece in wrap_line(text, WIDTH)]


def warned(report: Report) -> list[tuple[str, VideoFacts]]:
    """Return the names of a report's warnings, each paired with the `VideoFacts` of the video it refers to.

    Input warnings come first, followed by model warnings.
    """
    own = [(name, facts.video) for facts in report.inputs for name in facts.warnings]
    about = report.video
    if len(report.inputs) > 1:
        names = [os.path.basename(os.path.abspath(facts.path)) for facts in report.inputs]
        about = replace(about, path=listed(names))
    return [*own, *((name, about) for name in report.warnings if name not in {known for known, _ in own})]


def warning_title(name: str) -> str:
    return "note" if name in NOTES else "warning"


def warning_text(name: str, video: VideoFacts, path: str | None = None, answers: str | None = None) -> str:
    """Return the text of a warning.

    Args:
        name: Name of the warning.
        video: The video that the warning refers to.
        path: How to refer to the video in the text. Defaults to the base name of its path.
        answers: The words to put before "meaningless". Defaults to "its answer about PATH is".
    """
    path = path or os.path.basename(os.path.abspath(video.path or "the video"))
    if video.path == "-":
        path = "standard input"
    return WARNINGS.get(name, name).format(
        damaged=video.damaged or 0,
        ends=clock(video.duration_s),
        stated=clock(video.stated_s),
        gap=clock(video.clock_gap_s),
        cache=cache_folder(),
        video=path,
        answers=answers or f"its answer about {path} is",
    )


def record_line(record: dict[str, Any], ascii_only: bool) -> str:
    """Return a record as a single line of compact JSON. See `Report.to_json`."""
    text = json.dumps(rounded(record), ensure_ascii=ascii_only, separators=(",", ":"), allow_nan=False)
    return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
