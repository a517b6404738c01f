"""Metadata of the bundled demo models: their files, training setup, and vocabulary. Does not import numpy."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

__all__ = ["DEMOS", "Demo"]
_WEIGHTS = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """A bundled demo model, trained on generated clips (see docs/demo-model.md)."""

    SCORERS: ClassVar[Path] = _WEIGHTS / "scorers"  # folders of scorers for the demo models, see contrib/scorer.py

    folder: Path
    world: str
    tag: str  # comment that the clip generator writes to each clip's metadata
    inputs: int  # maximum number of inputs in a training prompt
    span: int  # number of temporal positions in the longest training clip, two per second
    presence: str  # training question that asks whether an object is present; {} is a placeholder for the object's name

    def questions_of(self, query: str) -> tuple[tuple[str, bool], ...]:
        """Return yes-or-no questions that determine whether a query such as "a red star" or "a red star appears" is true.

        The query may start with an article. Each question is paired with the answer that supports the query (True for yes).
        """
        thing = ARTICLE.sub("", query.strip(), count=1)
        event: tuple[tuple[str, bool], ...] = ()
        for verb, asked in EVENTS.items():
            if thing.endswith(verb):
                thing = thing.removesuffix(verb).strip()
                event = asked
        return tuple((text.format(thing), yes) for text, yes in ((self.presence, True), *event))

    def unknown_words(self, question: str) -> list[str]:
        """Return the words in a question that don't occur in any training question, in order and in lowercase."""
        signs = self.world == "scenes"
        words = (word for word in re.findall(r"\w+", question) if not (signs and SIGN.fullmatch(word)))
        return [word for word in map(str.lower, words) if word not in WORDS[self.world]]

    def made(self, tags: Mapping[str, str]) -> bool:
        """Return True if a video's metadata tags show that it comes from the generator of this demo's training clips."""
        return any(key.lower() == "comment" and text == self.tag for key, text in tags.items())

    @staticmethod
    def stores_tags(container: str) -> bool:
        """Return True if a container format can store tags. Files in other formats don't reveal how they were created."""
        return _NO_COMMENTS.isdisjoint(container.split(","))

    @classmethod
    def of(cls, folder: Path | None) -> Self | None:
        """Return the demo model stored in `folder`, or None if the folder is None or contains a different model."""
        return next((demo for demo in DEMOS.values() if folder and demo.folder.resolve() == folder.resolve()), None)


ARTICLE = re.compile(r"^(a|an|any|the)\s+", re.IGNORECASE)
AT_START = "Is the {} there at the start?"
AT_END = "Is the {} there at the end?"
# For each verb that describes an event, the training questions about the event, each with its answer (True for yes). The event is
# considered to happen if the model gives these answers to all of the questions. All demo models were trained on these questions.
EVENTS = {
    " appears": ((AT_START, False), (AT_END, True)),
    " vanishes": ((AT_START, True), (AT_END, False)),
}

DEMOS = {
    "demo": Demo(_WEIGHTS / "demo", "shapes", "evoprune demo clip", inputs=1, span=48, presence="Is there a {}?"),
    "demo-scenes": Demo(
        _WEIGHTS / "demo-scenes", "scenes", "evoprune scenes clip", inputs=2, span=64, presence="Is there any {}?"
    ),
}

# Formats that can't store comments, by FFmpeg name: transport formats, raw formats, and frames without a file.
_NO_COMMENTS = {
    "mpegts", "hls", "dash", "rtsp", "rtp", "sdp", "mpeg", "mpegvideo", "mjpeg", "mpjpeg", "h264", "hevc", "av1", "obu", "ivf",
    "yuv4mpegpipe", "apng", "stream",
}  # fmt: skip

WORDS = {  # for scenes, this includes words from answer options and from the sentence that asks for a letter
    world: frozenset(text.split())
    for world, text in {
        "shapes": """
        a above appear appears are at be below big blue bottom can circle color colour count cross cyan describe diamond digit
        direction does end first flash flashes go green half happens have how in is it large left many move number of one or
        orange purple red right ring see seen shape shapes shown small square stay the there thing to top triangle vanish
        vanishes video way what where which white yellow you
        """,
        "scenes": """
        a above after all answer any appear appears are at b be before blinks blue bottom c camera can cannot changes
        checked choices circle circles colour column cross crosses cut cyan d directly disappear do does dotted down
        end first flash flashes from furthest given go green half happens have heart hearts how in is its last left
        letter lies list many missing moon moons move moves not of often on option orange out pans pattern picture
        plain purple red right ring rings row s say says second seen shape sign something square squares stands star
        stars start stays still striped that the there these thing things time to top triangle triangles up vanish
        vanishes video way what when where which white with written yellow zooms
        """,
    }.items()
}
# Text that may be written on signs. The model reads signs letter by letter, so questions may contain arbitrary uppercase words and
# numbers.
SIGN = re.compile(r"[A-Z]{3,6}|\d+")
