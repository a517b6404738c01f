"""The record of one question, as plain dataclasses. Converts to and from JSON (schema `evoprune/answer@1`), and to lines of text.

docs/json.md describes the fields. Unknown values are None. Fields are only ever added, never removed. Times are in milliseconds,
sizes in bytes. The text has a row per stage, with its time, a bar, its input and its output. Unknown values are left out, so
records of errors and of a Hugging Face model can be printed too.
"""

import json
import os
import re
import textwrap
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from math import ceil, floor
from typing import Any

from evoprune.bundled import DEMOS
from evoprune.util import budget_text, clock, counted, listed, one_line, shorten, shown, size

SCHEMA = "evoprune/answer@1"
# Reasons why the report of a Hugging Face model call is empty, by their name in `warnings`.
EMPTY = {
    "not_active": "pruning is not active: call the model inside `with`, or after evoprune.apply",
    "no_video": "no video in this call",
    "pictures_only": "pictures are not pruned without pictures=True",
    "own_code": "the model's own code encoded the video",
}
# Control characters that JSON allows in strings, and marks for direction and line breaks. With these, a file name or an answer
# could make a terminal show a different text.
INVISIBLE = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

AS_IT_IS = ("parsed", "schema")  # fields whose numbers are not rounded, because they are not measured
STAGES = ("plan", "read", "preprocess", "compile", "encode", "store", "prefill", "generate")
BESIDE = "overlap"  # not a stage: time for reading and preprocessing that overlapped with other work
# Stages per input. A later question about the same input does not wait for them again.
OF_INPUTS = ("plan", "read", "preprocess", "compile", "encode", "store", BESIDE)
SELDOM = ("compile", "store")  # stages that have a line only if they take at least a millisecond
WIDTH = 80
BAR = 12
INDENT = " " * 11
KNOWN = "the demo models know only generated clips (demo: coloured shapes and digits; demo-scenes: crowded scenes with signs)"
FLAT = "equal_scores"  # the warning about a video whose selection had nothing to go by
WARNINGS = {
    "whole_picture": "{video} stays whole: the method prunes frames of videos, and a picture has one",
    "pictures_whole": "the pictures stay whole without pictures=True; counts of pruning are those of the videos alone",
    FLAT: "{video} shows nothing but even colours, so pruning had nothing to go by",
    "random_weights": "the weights are random, so the answer means nothing; times and counts are those of the true dimensions",
    "cache_not_written": "the encoded video could not be stored; `evoprune inspect` names the folder: is it full, or read-only?",
    "damaged_subtitles": "some of the subtitles cannot be decoded and are left out; is their text UTF-8?",
    "subtitles_encoding": "the file of subtitles is not UTF-8 and was read as Windows-1252; if letters are wrong, save it as UTF-8",
    "damaged_video": "{video} is damaged ({damaged:,} of its packets or images); each frame that cannot be decoded was "
    "replaced by the one before it",
    "cut_short": "{video} breaks off at {ends}, although its file says that it lasts until {stated}",
    "hdr_video": "{video} is HDR, mapped to SDR",
    "interlaced_video": "{video} is interlaced: edges of what moves look like combs. Deinterlace it first, e.g. with ffmpeg -i IN "
    "-vf bwdif OUT",
    "stretched_video": "the pixels of {video} are not square, and are read as if they were: it looks narrower or wider than in a "
    "player. Scale it first, e.g. with ffmpeg -i IN -vf scale=iw*sar:ih,setsar=1 OUT",
    "other_tracks": "{video} has more than one video track; only the main one is read. Extract another with ffmpeg -map",
    "changing_size": "{video} changes the size of its pictures: all are read at the size of the first, those of another shape "
    "between black borders",
    "guessed_rate": "{video} does not state its frame rate, and is read at 25 frames a second: times are right only if that is it. "
    "ffmpeg -r RATE -i IN -c copy OUT.mp4 states it",
    "clock_gap": "the clock of {video} jumps ahead by {gap}: what follows is read as if it came at once. If it is a gap, times "
    "behind it are too early by so much",
    "joined_files": "{video} holds another file after its first one, as cat writes it: what follows the first may be missing or "
    "misplaced. ffmpeg -f concat joins videos",
    "sound_ignored": "the sound of {video} is not read, so an answer about it comes from the pictures alone; --subtitles (in "
    "Python subtitles) reads a file that says what is spoken",
    "limited": "fewer or smaller frames were looked at than --fps or --frames ask for; --max-frames and --max-visual-tokens "
    "set the limits",
    "answer_cut": "the answer may be incomplete: -n (max_new_tokens) allows no more tokens",
    "history_cut": "the conversation does not fit into the model's context any more: its oldest turns are left out",
    "thoughts_cut": "the model was still thinking when -n (max_new_tokens) allowed no more tokens, so there is no answer",
    "thoughts_only": "the model ended inside its thoughts, so there is no answer",
    "always_thinks": "this model thinks before every answer, and has no switch for it; -n (max_new_tokens) counts its thoughts too",
    "demo_model": f"{KNOWN}; {{answers}} nothing. For a real answer: --model=Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_untold": f"{KNOWN}; the format of {{video}} does not tell whether it is one of these. If it is not, trust no answer "
    "about it. For any video: --model=Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_inputs": "the demo models were trained without subtitles, and on few inputs at a time (demo: one video; demo-scenes: "
    "up to two videos or pictures); answers about others mean little",
    "demo_question": "a demo model knows only the words of its training, and a question has others; its answer means little. "
    "samples/questions.jsonl has questions that demo knows, and docs/demo-model.md some for demo-scenes",
    "demo_history": "the demo models know single questions: after others they are right less often (docs/limits.md)",
    "demo_overlay": f"{KNOWN}; what the model merges and selects in {{video}} "
    "says little. For a real model: --model=Qwen/Qwen2.5-VL-3B-Instruct",
}
NOTES = ("hdr_video", "sound_ignored")  # warnings that may need no action
# English words in questions about sound.
ABOUT_SOUND = re.compile(
    r"\b(say(s|ing)?|said|speak(s|ing|er|ers)?|spoken?|speech|talk(s|ed|ing)?|voices?|hear(s|d|ing)?|listen(s|ed|ing)?|sounds?"
    r"|sing(s|ing|er)?|sang|songs?|music|audio|nois(e|es|y)|loud(ly|er)?)\b",
    re.IGNORECASE,
)


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
    grid_thw: list[int] | None = None  # in patches, as in Hugging Face
    seconds_per_pair: float | None = None
    seek: str | None = None  # "exact", or "keyframes" if a time was moved to a keyframe
    read_s: list[float] | None = None  # actual times of the frames


@dataclass
class Pruning:
    method: str | None = None
    args: dict[str, Any] | None = None
    budget: float | str | None = None  # "auto" or "auto:inflection" if the content determines it
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
    """Times of one input; see `Times`."""

    read: float | None = None
    preprocess: float | None = None
    encode: float | None = None
    encode_prune: float | None = None
    plan: float | None = None
    compile: float | None = None
    store: float | None = None
    overlap: float | None = None


@dataclass
class InputFacts:
    """Facts about one input of a question.

    `time_ms` has the times of encoding the input, even if an earlier question waited for it. `warnings` has the warnings about this
    input.
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
    text: int | None = None
    visual: int | None = None
    prompt: int | None = None
    new: int | None = None


@dataclass
class Times:
    """Times of the stages. Stages before `generate` add up to `ttft_wall`, after subtracting `overlap`."""

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


@dataclass
class Rate:
    generate_tok_s: float | None = None


@dataclass
class Memory:
    """Memory in bytes.

    `peak_bytes` includes mapped file pages, which the system can drop. `own_bytes` is the memory in use without them.
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
        """The dtype and the quantization, as tables show them."""
        return precision(self.dtype, self.quantize)


def precision(dtype: str | None, quantize: str | None) -> str:
    """Return the dtype, followed by the quantization if there is one: "fp32", "fp32 int8"."""
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
class Report:
    """The record of a question: its answer or error, and everything that was measured on the way.

    `inputs` has the facts about each input. If there is only one, `video`, `sampling`, `pruning` and `subtitles` are the same as in
    its entry. If there are several, `pruning` applies to all of them together, and the other three are empty.
    """

    schema: str = SCHEMA
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_utc: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    question: str | None = None
    answer: str | None = None
    thoughts: str | None = None  # what the model wrote before the answer
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
    stop_reason: str | None = None  # the stop string that ended the answer
    logprobs: list[dict[str, Any]] | None = None  # for all tokens in the answer and its thoughts
    parsed: Any = None  # data in an answer that follows a schema
    choices: list[dict[str, Any]] | None = None  # possible answers and their probabilities

    def __str__(self) -> str:
        """Return the statistics and the warnings as lines of text, as the command line prints them."""
        stats = stats_block(self)
        if not stats:
            return repr(self)
        return "\n".join([*stats, *warning_lines(self)])

    def __repr__(self) -> str:
        pruning = self.pruning
        first = self.time_ms.ttft_wall
        facts = [
            f"{name} {getattr(self, name)!r}" for name in ("question", "answer") if getattr(self, name) is not None
        ]
        if self.error:
            facts.append(f"error {self.error['message']!r}")
        if pruning.visual_tokens_kept is not None:
            facts.append(f"{pruning.visual_tokens_kept:,} of {pruning.visual_tokens_in:,} visual tokens")
        if first is not None:
            facts.append(f"first token {first:,.0f} ms")
        empty = ["empty", *(EMPTY[name] for name in self.warnings if name in EMPTY)]
        return f"<Report: {', '.join(facts) or ': '.join(empty)}>"

    def to_json(self, ascii_only: bool = False) -> str:
        """Return the record as one compact line.

        Invisible characters become JSON escapes. With `ascii_only`, all characters outside ASCII do.
        """
        text = json.dumps(rounded(asdict(self)), ensure_ascii=ascii_only, separators=(",", ":"), allow_nan=False)
        return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """Parse a report that `to_json` wrote. Fields of later versions are ignored.

        Raises:
            ValueError: not JSON, or not a record of this schema.
        """
        return cls._from_record(json.loads(text))

    @classmethod
    def _from_record(cls, record: Any) -> "Report":
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"not a record of {SCHEMA}")
        report = _filled(cls(), record)
        if report.compare is not None:
            report.compare = cls._from_record(report.compare)
        if not isinstance(report.inputs, list):
            raise ValueError("inputs is not a list")
        report.inputs = [_filled(InputFacts(), facts) for facts in report.inputs]
        return report


def _filled(target, record: Any, name: str = "a record"):
    """Fill a dataclass, including nested dataclasses, with the values of a record. Unknown fields are ignored."""
    if not isinstance(record, dict):
        raise ValueError(f"{name} is not an object")
    for field_, value in record.items():
        current = getattr(target, field_, None)
        if hasattr(current, "__dataclass_fields__"):
            _filled(current, value, field_)
        elif field_ in target.__dataclass_fields__:
            setattr(target, field_, value)
    return target


def name_inputs(report: Report, names: Sequence[str]) -> None:
    """Set the names of a report's inputs, if nothing else is known about them. Long names are shortened."""
    names = [shown(name) for name in names]
    report.inputs = [InputFacts(path=name, video=VideoFacts(path=name)) for name in names]
    if len(names) == 1:
        report.video = VideoFacts(path=names[0])


def rounded(value):
    """Return plain data with floats rounded to six decimals: a microsecond in seconds, a nanosecond in milliseconds."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {k: v if k in AS_IT_IS else rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


def stats_block(report: Report, width: int = WIDTH, verbose: bool = False) -> list[str]:
    """Return the statistics of a report as lines of at most `width` columns.

    With `verbose`, they include the rows per layer, settings and versions.
    """
    lines = [*_heading(report, width), *_stages(report, width), *_totals(report), *_memory(report.memory)]
    if report.compare:
        lines += _side_by_side(report, report.compare)
    if verbose:
        lines += _verbose(report)
    if report.error:
        lines.append(f"{'error':<11}{report.error['message']}")
    return [piece for line in lines for piece in _folded(line, width)]


def warning_lines(report: Report) -> list[str]:
    """Return the text of a report's warnings, as lines of at most `WIDTH` columns."""
    texts = (f"{warning_title(name):<11}{warning_text(name, video)}" for name, video in warned(report))
    return [piece for text in texts for piece in _folded(text, WIDTH)]


def warned(report: Report) -> list[tuple[str, VideoFacts]]:
    """Return the names of a report's warnings, each with the `VideoFacts` that it is about.

    Warnings about inputs come first, then warnings about the model.
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
        name: of the warning.
        video: the video that the warning is about.
        path: name of the video in the text; by default the base name of its path.
        answers: in the text, the answers that mean nothing; by default the answer about this video.
    """
    path = path or os.path.basename(os.path.abspath(video.path or "the video"))
    if video.path == "-":
        path = "standard input"
    facts = {
        "damaged": video.damaged or 0,
        "ends": clock(video.duration_s),
        "stated": clock(video.stated_s),
        "gap": clock(video.clock_gap_s),
    }
    return WARNINGS.get(name, name).format(**facts, video=path, answers=answers or f"its answer about {path} means")


def summary(report: Report) -> str:
    """Return one line with tokens, time to first token and total time, and the probabilities of choices."""
    tokens = report.tokens
    times = report.time_ms
    read = f"{counted(tokens.prompt or 0, 'token')} read ({tokens.visual or 0:,} visual), {tokens.new or 0:,} written"
    first = "not reached"
    if times.ttft_wall is not None:
        first = f"{times.ttft_wall:,.0f} ms"
    line = f"{read}; first token {first}, total {times.total or 0:,.0f} ms"
    if report.choices:
        line += f"; choices {_ranked(report.choices)}"
    return line


def _ranked(choices: Sequence[dict[str, Any]]) -> str:
    """Return choices with their probabilities, the most probable first."""
    ranked = sorted(choices, key=lambda choice: -choice["probability"])
    return ", ".join(f"{one_line(choice['text'])} {choice['probability']:.3f}" for choice in ranked)


def device_text(name: str | None, threads: int | None) -> str:
    """Return a device as a record names it, and the number of threads if it is the CPU."""
    if threads and (name or "").startswith("cpu"):
        return f"{name} ({counted(threads, 'thread')})"
    return str(name)


def _heading(report, width: int) -> list[str]:
    model = report.model
    pruning = report.pruning
    lines = []
    if model.id or model.device:
        name = model.id or "?"
        if os.path.isabs(name):
            name = os.path.basename(os.path.abspath(name))
        name = shorten(name, max(24, width - 40))
        lines.append(f"{'model':<11}{name}  {model.precision}  {device_text(model.device, report.env.threads)}")
    lines += [_input_line(facts, width) for facts in report.inputs or [report] if facts.video.path]
    if pruning.method:
        flags = pruning.method
        if pruning.method != "none":
            flags += f" -b {budget_text(pruning.budget)}"
        lines.append(f"{'pruning':<11}{flags}: {_kept(pruning)}")
    return lines


def _input_line(facts, width: int) -> str:
    """Return the line for a video or a picture: its name and known properties.

    Args:
        facts: an input of a report, or the report of a single input.
        width: of the line, in columns.
    """
    video = facts.video
    medium = getattr(facts, "kind", None) or "video"
    size = f"{video.width}x{video.height}"
    times = size
    if medium == "video":
        fps = f"{video.fps:.4g}" if video.fps else "?"
        times = f"{_span(facts)}  {size}  {fps} fps"
    known = ""
    if video.decoder:
        known = f"  {times}  {video.codec}  ({video.decoder})"
    name = one_line(os.path.basename(os.path.abspath(video.path)))
    return f"{medium:<11}{shorten(name, max(20, width - 11 - len(known)))}{known}"


def _kept(pruning) -> str:
    """Return the share of visual tokens kept. If layers of the language model drop some, return the share left after each drop."""
    kept = 100 * (pruning.kept_ratio or 0)
    read = pruning.language_layers or []
    left: dict[int, int] = {}  # by the number of tokens, how many layers have run before
    for layer, tokens in read:
        left.setdefault(tokens, layer)
    if len(left) < 2:
        return f"{kept:.1f}% kept, {100 - kept:.1f}% pruned"
    drops = list(left.items())[1:]
    shares = ", ".join(f"{100 * tokens / pruning.visual_tokens_in:.1f}%" for tokens, _ in drops)
    after = ", ".join(str(layer) for _, layer in drops)
    return f"{kept:.1f}% enter the language model; {shares} left after {after} of its {len(read)} layers"


def _span(report) -> str:
    """Return the length of the video, and the part that was read unless it is the whole video."""
    length = report.video.duration_s
    start = report.sampling.start_s
    end = report.sampling.end_s
    if None in (length, start, end) or (start <= 0.05 and end >= length - 0.05):
        return clock(length)
    return f"{clock(start)}-{clock(end)} of {clock(length)}"


def _stages(report, width: int) -> list[str]:
    times = report.time_ms
    flow = _flow(report)
    spent = {stage: getattr(times, stage) or 0 for stage in STAGES if _has_line(times, stage)}
    longest = max(spent.values(), default=0) or 1
    room = width - 21 - max((len(flow[stage]) for stage in spent), default=0)  # columns left for the bars
    bar = 0
    gap = ""
    if room >= 6:
        bar = min(BAR, room - 2)
        gap = "  "
    lines = []
    for stage, ms in spent.items():
        marks = "#" * round(bar * ms / longest)
        lines.append(f"{stage:<11}{ms:>8,.0f}  {marks:<{bar}}{gap}{flow[stage]}".rstrip())
        if pruning := getattr(times, f"{stage}_prune", None):
            line = f"{'  pruning':<11}{pruning:>8,.0f}"
            if stage == "encode":
                line += _only_after(report)
            lines.append(line)
        if stage == "generate" and (times.pack or 0) >= 1:
            lines.append(f"{'  packing':<11}{times.pack:>8,.0f}  of all stages, once for each layer")
        if stage == "preprocess" and (times.overlap or 0) >= 1:
            lines.append(f"{'  overlap':<11}{-times.overlap:>8,.0f}  ran beside other work")
    if lines:
        lines.insert(0, f"{'stage':<11}{'ms':>8}")
    if times.read:
        lines += _each_input(report)
    return lines


def _only_after(report) -> str:
    """Return a note if inputs were pruned only after the tower because they are small, otherwise an empty string."""
    pruning = report.pruning
    if not pruning.after_tower_inputs:
        return ""
    return f"  after the tower alone: under {pruning.after_tower_below:,} visual tokens"


def _has_line(times: Times, stage: str) -> bool:
    """Return whether a stage was reached, and was timed for this question rather than an earlier one about the same video."""
    spent = getattr(times, stage)
    if stage in ("prefill", "generate"):
        return spent is not None
    return bool(spent) and (spent >= 1 or stage not in SELDOM)


def _each_input(report) -> list[str]:
    """Return a line per input with its times and tokens, if there are several."""
    lines = []
    for number, facts in enumerate(report.inputs, 1):
        kept = facts.pruning
        spent = facts.time_ms
        if len(report.inputs) > 1 and spent.read is not None:
            times = f"read {spent.read:,.0f}, preprocess {spent.preprocess:,.0f}, encode {spent.encode:,.0f} ms"
            tokens = f"{kept.visual_tokens_in or 0:,} visual tokens -> {kept.visual_tokens_kept or 0:,}"
            lines.append(f"{f'input {number}':<11}{tokens}; {times}")
    return lines


def _frames_read(report) -> str:
    """Return the number of frames in the video, in the part that was read (if known), and taken."""
    video = report.video
    sampling = report.sampling
    if not video.frames_total:
        return counted(sampling.frames, "frame")
    part = ""
    if "-" in _span(report) and video.fps and video.variable_rate is False:
        # Count frames on screen between start and end. Times are exact to a hundredth of a frame.
        inside = ceil(sampling.end_s * video.fps - 0.01) - floor(sampling.start_s * video.fps + 0.01)
        part = f"{inside:,} of "
    return f"{part}{counted(video.frames_total, 'frame')} -> {sampling.frames}"


def _flow(report) -> dict[str, str]:
    pruning = report.pruning
    sampling = report.sampling
    count = report.tokens
    flow = dict.fromkeys(STAGES, "")
    flow["plan"] = "whether memory and context suffice"
    flow["compile"] = "kernels, once a machine; loaded once a process"
    flow["store"] = "into the cache"
    if len(report.inputs) > 1:
        flow["read"] = f"{len(report.inputs)} inputs"
    elif sampling.frames:
        height, width = sampling.resized_hw
        still = any(facts.kind == "picture" for facts in report.inputs)
        flow["read"] = _frames_read(report)
        flow["preprocess"] = f"{counted(sampling.frames, 'frame')} of {width}x{height}"
        if still:
            flow["read"] = "a picture"
            flow["preprocess"] = f"{width}x{height}"
    if pruning.visual_tokens_kept is not None:
        tokens = counted(pruning.visual_tokens_in, "visual token")
        kept = pruning.visual_tokens_kept
        flow["encode"] = f"{tokens} -> {kept:,}, with {100 * (pruning.encoder_live_share or 0):.0f}% of the work"
        if report.cache == "hit":
            flow["read"] = f"{counted(kept, 'visual token')} from the cache"
    if count.prompt is not None:
        drops = [tokens for _, tokens in pruning.language_layers or []]
        fewer = [f"{tokens:,}" for tokens in dict.fromkeys(drops) if tokens < drops[0]]
        flow["prefill"] = (
            f"{counted(count.prompt, 'token')} read: {count.visual or 0:,} visual + {count.text or 0} text"
        )
        if fewer:
            flow["prefill"] += f", then {', '.join(fewer)} visual"
        flow["generate"] = f"{counted(count.new or 0, 'token')} written"
        if report.rate.generate_tok_s:
            flow["generate"] += f", {report.rate.generate_tok_s:.1f} tok/s"
    return flow


def _totals(report) -> list[str]:
    times = report.time_ms
    lines = []
    if report.choices:
        lines.append(f"{'choices':<11}{_ranked(report.choices)}")
    if times.ttft_wall is not None:
        line = f"{'first token':<11}{times.ttft_wall:>8,.0f}"
        if times.ttft_model is not None:
            line += f"  (encode + prefill: {times.ttft_model:,.0f})"
        lines.append(line)
    elif report.answer is None and report.question is not None and times.total is not None:
        lines.append(f"{'first token':<11}  not reached")
    if times.total is not None:
        line = f"{'total':<11}{times.total:>8,.0f}"
        if times.load is not None:
            line += f"  (loading the model, not counted: {times.load:,.0f})"
        elif not (report.video.path or report.question):
            line += "  (the whole call)"
        lines.append(line)
    return lines


def _memory(memory) -> list[str]:
    """Return the line for peak memory, and on a CPU a line for the process's own memory and mapped files in use."""
    if memory.peak_bytes is None:
        return []
    lines = [f"{'memory':<11}peak {size(memory.peak_bytes)}; weights {size(memory.weights_bytes)}"]
    if memory.own_bytes is not None and memory.mapped_bytes is not None:
        files = f"{size(memory.mapped_bytes)} of mapped files that can be dropped"
        lines.append(f"{INDENT}now {size(memory.own_bytes)} its own, and {files}")
    return lines


def _side_by_side(pruned, full) -> list[str]:
    """Return lines that compare time and tokens of a question with and without pruning.

    Only the time for encode and prefill is compared, because the second run reuses the patches that the first one has read.
    """
    rows = (
        ("encode + prefill", pruned.time_ms.ttft_model, full.time_ms.ttft_model),
        ("visual tokens", pruned.tokens.visual, full.tokens.visual),
    )
    lines = [f"{'compare':<16}{'pruned':>9}{'full':>9}"]
    for name, ours, theirs in rows:
        line = f"{name:<16}{_figure(ours):>9}{_figure(theirs):>9}"
        if ours and theirs:
            line += f"{theirs / ours:>7.1f}x"
        lines.append(line)
    if along := pruned.agreement:
        agree = f"agrees at {along['agree']} of {counted(along['tokens'], 'token')} of the full answer"
        lines.append(f"{'agreement':<16}{agree}, KL {along['kl']:.3f} nats")
    why = "the first of the two also warms up"
    if pruned.model.id in DEMOS:
        why = "the demo is too small to gain time"
    return [*lines, f"{why}; to measure: evoprune profile"]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _folded(line: str, width: int) -> list[str]:
    """Return the line, wrapped at `width` columns between words, with the later pieces indented."""
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, max(width, 30), subsequent_indent=INDENT)


def _verbose(report) -> list[str]:
    """Return lines with loading times in ms, grid, rows or tokens per layer, tokens per frame pair, settings and versions."""
    env = report.env
    times = report.time_ms
    pruning = report.pruning
    loads = {"tokenizer": times.load_tokenizer, "weights": times.load_weights, "preparing": times.load_prepare}
    grid = ["unknown"]
    if report.sampling.grid_thw:
        pairs, high, wide = report.sampling.grid_thw
        grid = [counted(pairs, "frame pair"), "of", f"{high}x{wide}", "patches"]
    lines = [
        *_wrapped("load", [f"{name}={spent:,.0f}" for name, spent in loads.items() if spent is not None]),
        *_wrapped("grid", grid),
        *_wrapped("rows", [f"{layer}:{rows:,}" for layer, rows in pruning.layers or []]),
    ]
    if read := pruning.language_layers:
        lines += _wrapped("read", [f"{layer}:{tokens:,}" for layer, tokens in read])
    if work := pruning.language_work:
        lines += _wrapped("work", [f"{layer}:{k:,}/{q:,}/{m:,}" for layer, k, q, m in work])
    lines += _wrapped("kept", [f"{n:,}" for n in pruning.kept_per_pair or []])
    if report.subtitles:
        lines.append(_subtitles(report.subtitles))
    return [
        *lines,
        *_wrapped("settings", [f"{k}={v}" for k, v in (pruning.args or {}).items()] or ["none"]),
        *_wrapped("versions", [f"evoprune {env.evoprune},", f"torch {env.torch},", f"transformers {env.transformers}"]),
        *_wrapped("device", [str(env.device_name)]),
    ]


def _subtitles(said: dict) -> str:
    name = one_line(said["source"])
    count = f"{said['lines_in_prompt']:,} of {counted(said['lines'], 'line')}, {counted(said['tokens'], 'token')}"
    return f"{'subtitles':<11}{shorten(name, WIDTH - 13 - len(count))}: {count}"


def _wrapped(title: str, words: list[str]) -> list[str]:
    settings = {"break_long_words": False, "break_on_hyphens": False}
    lines = textwrap.wrap(" ".join(words), WIDTH, initial_indent=f"{title:<11}", subsequent_indent=INDENT, **settings)
    return lines or [f"{title:<10}"]
