"""What one question measured: plain dataclasses, to JSON and back (schema `evoprune/answer@1`).

docs/json.md says what each field is. Unknown values are None. Fields are only ever added. Times are milliseconds, sizes bytes.
"""

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from evoprune.report.stats import stats_block, warning_lines
from evoprune.text import shown

SCHEMA = "evoprune/answer@1"
# Why the report of a call of a Hugging Face model is empty, by the name in `warnings`.
EMPTY = {
    "not_active": "pruning is not active: call the model inside `with`, or after evoprune.apply",
    "no_video": "no video in this call",
    "pictures_only": "pictures are not pruned without pictures=True",
    "own_code": "the model's own code encoded the video",
}
# Control characters that JSON allows in texts, and marks of direction and of lines: with these, a file's name or an answer could
# make a terminal show another text than there is.
INVISIBLE = re.compile(r"[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


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


@dataclass
class Sampling:
    start_s: float | None = None
    end_s: float | None = None
    frames: int | None = None
    timestamps_s: list[float] | None = None
    resized_hw: list[int] | None = None
    grid_thw: list[int] | None = None  # in patches, as Hugging Face counts
    seconds_per_pair: float | None = None


@dataclass
class Pruning:
    method: str | None = None
    args: dict[str, Any] | None = None
    budget: float | str | None = None  # "auto" or "auto:inflection" if the content decides
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


@dataclass
class InputTimes:
    """Of one input; as in `Times`."""

    read: float | None = None
    preprocess: float | None = None
    encode: float | None = None
    encode_prune: float | None = None


@dataclass
class InputFacts:
    """One input of a question. `time_ms`: what its encoding took, whichever question paid for it. `warnings`: about this input."""

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


@dataclass
class Rate:
    generate_tok_s: float | None = None


@dataclass
class Memory:
    """`peak_bytes` counts mapped pages of files, which the system can drop; `own_bytes` says what is in use without them."""

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

    @property
    def precision(self) -> str:
        """Dtype and bits, as tables name them."""
        return precision(self.dtype, self.quantize)


def precision(dtype: str | None, quantize: str | None) -> str:
    """ "fp32", or "fp32 int8" where weights are quantised."""
    return f"{dtype}" if quantize in (None, "none") else f"{dtype} {quantize}"


@dataclass
class Environment:
    evoprune: str | None = None
    torch: str | None = None
    transformers: str | None = None
    device_name: str | None = None
    threads: int | None = None


@dataclass
class Report:
    """One record: a question, its answer (or error), and everything that was measured on the way.

    `inputs`: each input by itself. Of one input `video`, `sampling`, `pruning` and `subtitles` are the same. Of several `pruning`
    is that of all together, and the others are empty.
    """

    schema: str = SCHEMA
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created_utc: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))
    question: str | None = None
    answer: str | None = None
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

    def __str__(self) -> str:
        """The stats as lines of text, as the command line prints them, and what the warnings say."""
        stats = stats_block(self)
        return "\n".join([*stats, *warning_lines(self)]) if stats else repr(self)

    def __repr__(self) -> str:
        pruning, first = self.pruning, self.time_ms.ttft_wall
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
        """One compact line; `ascii_only` spells everything else as JSON escapes, as invisible characters always are."""
        text = json.dumps(rounded(asdict(self)), ensure_ascii=ascii_only, separators=(",", ":"), allow_nan=False)
        return INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that `to_json` wrote; fields of later versions are ignored.

        Raises ValueError: not JSON, or not a record of this schema.
        """
        return cls._from_record(json.loads(text))

    @classmethod
    def _from_record(cls, record: Any) -> "Report":
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise ValueError(f"not a record of {SCHEMA}")
        made = _filled(cls(), record)
        if made.compare is not None:
            made.compare = cls._from_record(made.compare)
        if not isinstance(made.inputs, list):
            raise ValueError("inputs is not a list")
        made.inputs = [_filled(InputFacts(), each) for each in made.inputs]
        return made


def _filled(made, record: Any, name: str = "a record"):
    """A dataclass with the values of a record; those of dataclasses inside it, too. Fields that it does not have are ignored."""
    if not isinstance(record, dict):
        raise ValueError(f"{name} is not an object")
    for field_, value in record.items():
        current = getattr(made, field_, None)
        if hasattr(current, "__dataclass_fields__"):
            _filled(current, value, field_)
        elif field_ in made.__dataclass_fields__:
            setattr(made, field_, value)
    return made


def name_inputs(report: Report, names: Sequence[str]) -> None:
    """Writes into a report what its inputs are called, where nothing else is known of them; not whole if that is no name."""
    names = [shown(name) for name in names]
    report.inputs = [InputFacts(path=name, video=VideoFacts(path=name)) for name in names]
    if len(names) == 1:
        report.video = VideoFacts(path=names[0])


def rounded(value):
    """Plain data with floats to six decimals: a microsecond in seconds, a nanosecond in milliseconds."""
    if isinstance(value, float):
        return round(value, 6)
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value
