"""Measure the word error rate of `--speech` on ten minutes of generated speech.

    python -m experiments.accuracy.speech MODEL

MODEL is any model that `--speech` accepts. espeak-ng reads sentences aloud in different voices and at different speeds, and FFmpeg
turns them into a video. Punctuation and capitalization are removed from both the reference and the transcript.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from evoprune.session import speech_of
from evoprune.video import SamplingOptions, probe

VOICES = ("en-us", "en-gb", "en-us+f3", "en-gb+m3")
SPEEDS = (130, 150, 170)  # words per minute
PAUSE_S = 1.0  # length of the pause after every sentence, in seconds
# The first two lists of the Harvard sentences (IEEE, 1969).
SENTENCES = (
    "The birch canoe slid on the smooth planks.",
    "Glue the sheet to the dark blue background.",
    "It's easy to tell the depth of a well.",
    "These days a chicken leg is a rare dish.",
    "Rice is often served in round bowls.",
    "The juice of lemons makes fine punch.",
    "The box was thrown beside the parked truck.",
    "The hogs were fed chopped corn and garbage.",
    "Four hours of steady work faced us.",
    "A large size in stockings is hard to sell.",
    "The boy was there when the sun rose.",
    "A rod is used to catch pink salmon.",
    "The source of the huge river is the clear spring.",
    "Kick the ball straight and follow through.",
    "Help the woman get back to her feet.",
    "A pot of tea helps to pass the evening.",
    "Smoky fires lack flame and heat.",
    "The soft cushion broke the man's fall.",
    "The salt breeze came across from the sea.",
    "The girl at the booth sold fifty bonds.",
)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def word_errors(said: Sequence[str], heard: Sequence[str]) -> int:
    """Return the minimum number of word replacements, insertions, and deletions between two lists (Levenshtein distance)."""
    before = list(range(len(heard) + 1))
    for row, word in enumerate(said, 1):
        now = [row]
        for column, other in enumerate(heard, 1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (word != other)))
        before = now
    return before[-1]


def speak(folder: Path) -> tuple[Path, list[str]]:
    """Create a video in which every voice reads every sentence at every speed. Returns the video path and the spoken words."""
    said = []
    raw = folder / "said.raw"
    with raw.open("wb") as sound:
        for voice in VOICES:
            for speed in SPEEDS:
                for sentence in SENTENCES:
                    spoken = ["espeak-ng", "-v", voice, "-s", str(speed), "--stdout", sentence]
                    wave = subprocess.run(spoken, check=True, capture_output=True).stdout  # noqa: S603
                    sound.write(wave[44:] + bytes(2 * round(22_050 * PAUSE_S)))
                    said += words(sentence)
    path = folder / "said.mp4"
    make = (
        "-f s16le -ar 22050 -ac 1 -i {raw} -f lavfi -i testsrc=size=64x48:rate=1 -shortest -c:a aac -c:v libx264 {path}"
    )
    ffmpeg = ["ffmpeg", "-loglevel", "error", *(word.format(raw=raw, path=path) for word in make.split())]
    subprocess.run(ffmpeg, check=True)  # noqa: S603
    return path, said


def main(model: str) -> None:
    with TemporaryDirectory() as temporary:
        path, said = speak(Path(temporary))
        info = probe(path)
        start = time.perf_counter()
        span = 0.0, info.length_s
        found = speech_of(info, SamplingOptions(speech=model), span, SimpleNamespace(offline=False, cores=None))
        seconds = time.perf_counter() - start
    heard = words(" ".join(text for *_, text in found.lines))
    wrong = word_errors(said, heard)
    print(f"{info.length_s:.0f} s of sound, {len(said):,} words, {len(found.lines)} lines, language {found.language}")
    print(f"{wrong} word errors, {100 * wrong / len(said):.1f}%; {seconds:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1])
