"""`evoprune ask --show`: writes a web page with the answers, and with the frames and what happened to their units.

The page is a single file that needs no network. Its size and the memory for it are bounded: there are at most `MOST_FRAMES` frames,
which are kept as small JPEG files, and long texts are cut.
"""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError
from evoprune.report import Report, warned, warning_text, warning_title
from evoprune.statistics import BRIEF_STAGES, device_text
from evoprune.util import budget_text, counted, one_line, shorten, shown
from evoprune_cli.delivery import check_writable, write_bytes

if TYPE_CHECKING:
    import numpy as np

    from evoprune.bench import Fates
    from evoprune.methods import PruneConfig
    from evoprune.video import FrameChunk, Plan
    from evoprune.vision import TowerOutput

ENDINGS = (".html", ".htm")
MOST_FRAMES = 48  # of all inputs together
MOST_UNITS = 200_000  # units of the frames of an input; only the first frame is shown if it alone has more
MOST_LINES = 50_000  # units of the frames of an input above which merge lines are left out
MOST_BARS = 400  # columns of a timeline
LONGEST_SIDE = 640  # of a frame, in pixels
QUALITY = 75
FRAME_BYTES = 5 * 2**19  # of all frames together, as base64
TEXT_BYTES = 2**20  # of all answers together; the latest are shown
LONGEST_TEXT = 20_000  # characters of a question, an answer, or thoughts
MOST_TOKENS = 300  # of an answer, with probabilities
MOST_CHOICES = 100
WHY = "a page shows the same units for every question"
# The fields of `time_ms`, in the order in which they are shown.
ORDER = (
    "startup",
    "load",
    "load_tokenizer",
    "load_weights",
    "load_prepare",
    "plan",
    "speech",
    "read",
    "preprocess",
    "overlap",
    "compile",
    "encode",
    "encode_prune",
    "store",
    "prefill",
    "prefill_prune",
    "generate",
    "pack",
    "ttft_model",
    "ttft_wall",
    "total",
)
BRIEF = (*BRIEF_STAGES, "overlap", "pack")  # shown only if they take at least 1 ms
ENDS = {
    "length": "The answer reached the token limit.",
    "interrupt": "The answer was interrupted.",
    "error": "The answer failed.",
}


class Page:
    """Collects frames while the inputs are encoded, and then the answers, and writes the page.

    Pass `frames` and `tower` to `open_inputs`, and the result of `watching` to `OpenInputs.encode`.

    Args:
        file: The page's path.
        inputs: The paths of the inputs, which must not be replaced.

    Raises:
        UsageError: If the file can't be written, or has the wrong ending.
    """

    def __init__(self, file: str, inputs: Sequence[str]):
        if not file.lower().endswith(ENDINGS):
            raise UsageError(f"--show {file}: the page is an HTML file", "use a name that ends in .html")
        check_writable(file, inputs=inputs)
        self._file = file
        self._each = max(1, MOST_FRAMES // len(inputs))  # maximum number of frames of an input
        self._frames: dict[int, tuple[Plan, list[bytes]]] = {}  # by the ID of the plan
        self._tower: TowerOutput | None = None  # the input being encoded
        self._fates: list[Fates] = []
        self._plans: list[Plan] = []
        self._reports: list[Report] = []

    @staticmethod
    def check(pruning: "PruneConfig") -> None:
        """Raise UsageError if what happens to the units depends on the question. Imports torch."""
        from evoprune.bench import Fates

        Fates.check(pruning, WHY)

    # While the inputs are encoded.

    def frames(self, plan: "Plan", chunks: "Iterator[FrameChunk]") -> "Iterator[FrameChunk]":
        """Keep the first frames of some frame pairs. Called again if memory runs out and the frames are read again."""
        kept: list[bytes] = []
        if id(plan) in self._frames or len(self._frames) < MOST_FRAMES:
            self._frames[id(plan)] = plan, kept
        per_pair = max(1, plan.sampling.frames // plan.grid[0])
        wanted = {pair * per_pair for pair in self._shown(plan)}
        with closing(chunks):
            for chunk in chunks:
                for place in range(len(chunk.times_s)):
                    if chunk.first + place in wanted:
                        kept.append(small(chunk.pixels[place], plan))
                yield chunk

    def tower(self, *given: Any, **options: Any) -> "TowerOutput":
        """Run the vision tower, and keep its output until the input has been encoded."""
        from evoprune.vision import encode_rows

        self._tower = None
        self._tower = encode_rows(*given, **options)
        return self._tower

    def watching(self, progress: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
        """Return a progress callback that also notes the fates of the units between two inputs, outside of their times."""

        def step(stage: str, done: int, total: int) -> None:
            if stage == "input":
                self._settle()
            progress(stage, done, total)

        return step

    def encoded(self, plans: "Sequence[Plan]") -> None:
        """Note that all inputs have been encoded."""
        self._settle()
        self._plans = list(plans)

    def _settle(self) -> None:
        from evoprune.bench import Fates

        if self._tower is not None and len(self._fates) < MOST_FRAMES:
            self._fates.append(Fates.of(self._tower))
        self._tower = None

    def _shown(self, plan: "Plan") -> list[int]:
        """Return the frame pairs that are shown, in ascending order."""
        count, height, width = plan.grid
        most = min(count, self._each, max(1, MOST_UNITS // (height * width)))
        return [place * count // most for place in range(most)]

    # The page.

    def add(self, report: Report) -> None:
        """Add an answer."""
        self._reports.append(report)

    def write(self) -> bool:
        """Write the page. Returns False if there is no answer, and thus no page.

        Raises:
            UsageError: If the file can't be written.
        """
        if not self._reports:
            return False
        from evoprune.bench import Fates

        template = files("evoprune_cli").joinpath("show.html").read_text(encoding="utf-8")
        page = Fates.with_drawing(template)
        policy = (
            f"default-src 'none'; img-src data:; {_hashed(page, 'style')}; {_hashed(page, 'script')}; base-uri 'none'"
        )
        # The texts of strangers come last, so that nothing is replaced in them.
        texts = {"POLICY": policy, "TITLE": self._title(), "DATA": _script_json(self._data())}
        page = re.sub(r"(?<=\")POLICY(?=\")|(?<=>)(TITLE|DATA)(?=<)", lambda found: texts[found[0]], page)
        write_bytes(self._file, page.encode())
        return True

    def _title(self) -> str:
        question = shorten(one_line(self._reports[0].question or ""), 80)
        return html.escape(f"{question} – evoprune")

    def _data(self) -> dict[str, Any]:
        first = self._reports[0]
        pruning = first.pruning
        name = first.model.id or "?"
        if os.path.isabs(name):
            name = os.path.basename(name)
        model = f"{shown(name)} {first.model.precision}, {device_text(first.model.device, first.env.threads)}"
        if pruning.method:
            model += f" · {pruning.method} -b {budget_text(pruning.budget)}"
        notes = []
        inputs = self._inputs()
        if len(inputs) < len(self._plans):
            notes.append(f"Only the first {len(inputs):,} of {len(self._plans):,} inputs are shown.")
        answers: list[dict[str, Any]] = []
        room = TEXT_BYTES
        for report in reversed(self._reports):
            answer = _answer(report)
            room -= len(json.dumps(answer))
            if answers and room < 0:
                notes.append(f"Only the last {len(answers):,} of {len(self._reports):,} answers are shown.")
                break
            answers.insert(0, answer)
        return {"model": model, "inputs": inputs, "notes": notes, "answers": answers}

    def _inputs(self) -> list[dict[str, Any]]:
        kept = [self._frames[id(plan)][1] for plan in self._plans[: len(self._fates)]]
        side = float(LONGEST_SIDE)
        while sum(map(len, (jpeg for each in kept for jpeg in each))) > FRAME_BYTES * 3 // 4:
            side *= 0.75
            kept = [[smaller(jpeg, side) for jpeg in each] for each in kept]
        facts = self._reports[0].inputs
        return [
            self._input(plan, fates, jpegs, about)
            for plan, fates, jpegs, about in zip(self._plans, self._fates, kept, facts, strict=False)
        ]

    def _input(self, plan: "Plan", fates: "Fates", jpegs: Sequence[bytes], about: Any) -> dict[str, Any]:
        count, height, width = plan.grid
        pairs = self._shown(plan)
        per_pair = max(1, plan.sampling.frames // count)
        lines = len(pairs) * height * width <= MOST_LINES
        counts = fates.counts()
        frames = "an image" if plan.is_picture else f"{counted(plan.sampling.frames, 'frame')}, two by two,"
        told = f"{frames} of {width} x {height} units: {counts['units']:,} units, {counts['encoded']:,} encoded"
        if about.subtitles:
            lines_read = counted(about.subtitles["lines_in_prompt"], "line")
            told += f"; {lines_read} of {os.path.basename(about.subtitles['source'])} in the prompt"
        note = ["Each frame stands for its frame pair."] if count > 1 else []
        if len(pairs) < count:
            note.append(f"{len(pairs):,} of {count:,} frame pairs are shown; the timeline and the numbers cover all.")
        if not lines:
            note.append("There are too many units for lines between merged units.")
        every = math.ceil(count / MOST_BARS)
        by_pair = fates.counts_per_pair()
        return {
            "name": one_line(os.path.basename(os.path.abspath(shown(about.path))))
            if about.path != "-"
            else "standard input",
            "facts": told[0].upper() + told[1:],
            "size": [plan.width, plan.height],
            "pairs": pairs,
            "times": None if plan.is_picture else [plan.sampling.times_s[pair * per_pair] for pair in pairs],
            "images": [base64.b64encode(jpeg).decode() for jpeg in jpegs],
            "bars": [
                [sum(each) for each in zip(*by_pair[at : at + every], strict=True)] for at in range(0, count, every)
            ],
            "note": " ".join(note),
            **fates.record(pairs, lines),
        }


def small(pixels: "np.ndarray", plan: "Plan") -> bytes:
    """Return a frame, uint8 `[H, W, 3]`, as a small JPEG file with the shape of the plan's frames."""
    from PIL import Image

    share = min(1.0, LONGEST_SIDE / max(plan.width, plan.height))
    size = (max(1, round(plan.width * share)), max(1, round(plan.height * share)))
    return _jpeg(Image.fromarray(pixels).resize(size, reducing_gap=2.0))


def smaller(jpeg: bytes, side: float) -> bytes:
    """Return a JPEG file with a longest side of at most `side` pixels."""
    from PIL import Image

    picture = Image.open(io.BytesIO(jpeg))
    picture.thumbnail((max(1, round(side)), max(1, round(side))))
    return _jpeg(picture)


def _jpeg(picture: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY)
    return file.getvalue()


def _answer(report: Report) -> dict[str, Any]:
    """Return what the page shows of an answer."""
    tokens = report.tokens
    kept = report.pruning
    told = f"{counted(tokens.prompt or 0, 'token')} read: {tokens.visual or 0:,} visual + {tokens.text or 0:,} text"
    if kept.visual_tokens_in:
        told += f" ({kept.visual_tokens_kept or 0:,} of {kept.visual_tokens_in:,} visual tokens kept)"
    times = asdict(report.time_ms)
    answer = {
        "question": _cut(report.question),
        "answer": _cut(report.answer),
        "thoughts": _cut(report.thoughts),
        "end": ENDS.get(report.finish_reason),
        "tokens": f"{told}; {tokens.new or 0:,} written",
        "time_ms": [[name, round(ms, 3)] for name in ORDER if (ms := times[name]) and (ms >= 1 or name not in BRIEF)],
        "warnings": [f"{warning_title(name)}: {warning_text(name, video)}" for name, video in warned(report)],
    }
    if report.choices:
        ranked = sorted(report.choices, key=lambda choice: -choice["probability"])[:MOST_CHOICES]
        answer["choices"] = [{"text": shorten(one["text"], 200), "probability": one["probability"]} for one in ranked]
    if report.logprobs:
        answer["logprobs"] = [
            {"token": shorten(one["token"], 200), "logprob": one["logprob"]} for one in report.logprobs[:MOST_TOKENS]
        ]
    if report.compare:
        answer["compare"] = _answer(report.compare)
    return answer


def _cut(text: str | None) -> str | None:
    if text is None or len(text) <= LONGEST_TEXT:
        return text
    return f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} more characters)"


def _script_json(data: Any) -> str:
    """Return JSON that contains neither `<` nor non-ASCII characters, so that no text in it can end a script element."""
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hashed(page: str, tag: str) -> str:
    """Return the directive of a Content-Security-Policy that allows only the page's own style or script."""
    (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"{tag}-src 'sha256-{digest}'"
