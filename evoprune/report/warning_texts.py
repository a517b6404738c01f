"""What the warnings of a report say."""

import os
from dataclasses import replace

from evoprune.text import clock, listed

KNOWN = "the demo models know only generated clips (demo: coloured shapes and digits; demo-scenes: crowded scenes with signs)"
WARNINGS = {
    "whole_picture": "{video} stays whole: the method prunes frames of videos, and a picture has one",
    "pictures_whole": "the pictures stay whole without pictures=True; counts of pruning are those of the videos alone",
    "equal_scores": "{video} is one even colour throughout, so pruning had nothing to go by",
    "random_weights": "the weights are random, so the answer means nothing; times and counts are those of the true dimensions",
    "cache_not_written": "the encoded video could not be stored; `evoprune inspect` names the folder: is it full, or read-only?",
    "damaged_subtitles": "some of the subtitles cannot be decoded and are left out; is their text UTF-8?",
    "subtitles_encoding": "the file of subtitles is not UTF-8 and was read as Windows-1252; if letters are wrong, save it as UTF-8",
    "damaged_video": "{video} is damaged ({damaged:,} of its packets or images); each frame that cannot be decoded was "
    "replaced by the one before it",
    "cut_short": "{video} breaks off at {ends}, although its file says that it lasts until {stated}",
    "limited": "fewer or smaller frames were looked at than --fps or --frames ask for; --max-frames and --max-visual-tokens "
    "set the limits",
    "demo_model": f"{KNOWN}; {{answers}} nothing. For a real answer: --model=Qwen/Qwen2.5-VL-3B-Instruct",
    "demo_inputs": "the demo models were trained without subtitles, and on few inputs at a time (demo: one video; demo-scenes: "
    "up to two videos or pictures); answers about others mean little",
    "demo_question": "a demo model knows only the words of its training, and a question has others; its answer means little. "
    "samples/questions.jsonl has questions that demo knows, and docs/demo-model.md some for demo-scenes",
    "demo_overlay": f"{KNOWN}; what the model merges and selects in {{video}} "
    "says little. For a real model: --model=Qwen/Qwen2.5-VL-3B-Instruct",
}


def warned(report) -> list[tuple]:
    """The warnings of a `Report`: names, and the `VideoFacts` that each is about. Those of inputs, then those about the model."""
    own = [(name, each.video) for each in report.inputs for name in each.warnings]
    names = [os.path.basename(os.path.abspath(each.path)) for each in report.inputs]
    about = replace(report.video, path=listed(names)) if len(names) > 1 else report.video
    return [*own, *((name, about) for name in report.warnings if name not in {known for known, _ in own})]


def warning_text(name: str, video, path: str | None = None, answers: str | None = None) -> str:
    """What a warning says.

    Args:
        video: the `VideoFacts` that it is about.
        path: what the video is called; None for the name of its file.
        answers: which answers mean nothing; None for the one about this video.
    """
    path = path or os.path.basename(os.path.abspath(video.path or "the video"))
    path = "standard input" if video.path == "-" else path
    facts = {"damaged": video.damaged or 0, "ends": clock(video.duration_s), "stated": clock(video.stated_s)}
    return WARNINGS.get(name, name).format(**facts, video=path, answers=answers or f"its answer about {path} means")
