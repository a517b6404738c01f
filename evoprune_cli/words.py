"""Positional arguments: tells inputs from the question, and rejects words that are neither."""

import os
import re
import shlex
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import takewhile

from evoprune.bundled import DEMOS
from evoprune.errors import UsageError, VideoError
from evoprune.util import (
    PATH,
    check_order,
    counted,
    is_url,
    looks_like_input,
    missing_hint,
    shown,
    some,
    without_password,
)
from evoprune.video import Folder

STDIN = "-"
ASK = 'evoprune ask video.mp4 "What happens?"'


def split_words(words: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """Split the positional arguments into inputs and the question, which is None if missing.

    If there is more than one word, the last word is treated as the question unless it is an existing file or looks like a filename.
    """
    *before, last = words
    if before and not exists(last) and not PATH.fullmatch(last):
        return tuple(before), last
    return tuple(words), None


def exists(word: str) -> bool:
    """Return True if a word appears to be an input: "-", a URL, or an existing path. No files are read."""
    try:
        return word == STDIN or is_url(word) or os.path.lexists(word)
    except ValueError:  # not a valid filename
        return False


def check_words(inputs: Sequence[str], question: str | None) -> None:
    """Check that all inputs exist if there are several. A single input is checked later, when it is opened.

    Raises:
        VideoError: If an input doesn't exist.
        UsageError: If stdin is given twice, or if some words aren't files and look like an unquoted question.
    """
    if inputs.count(STDIN) > 1:
        raise UsageError("standard input is given twice", "it can be read only once")
    check_not_swapped("ask", inputs, question)
    check_not_model(inputs[0], f"{ASK} -m")
    if len(inputs) == 1 and question is None and is_question(inputs[0]):
        (only,) = inputs
        if not exists(only) and not PATH.search(only):
            raise VideoError(f"no such file: {only}", missing_hint(only, f"the video comes first: {ASK}"))
    missing = [word for word in inputs if not exists(word)]
    if len(inputs) == 1 or not missing:
        return
    name = missing[0]
    last = inputs[-1]
    if name == inputs[0] and not PATH.fullmatch(name):
        raise VideoError(f"no such file: {name}", missing_hint(name, f"videos and images come first: {ASK}"))
    if not PATH.fullmatch(name):
        words = [*missing, *filter(None, [question])]
        there = shlex.join(shown(without_password(word)) for word in inputs if exists(word))
        if len(words) > 1 and all(map(is_question, words)):
            asked = " ".join(f"-Q {_quoted(word)}" for word in words)
            hint = (
                f"put -Q before each: evoprune ask {there} {asked}; -i opens a prompt for questions, and evoprune batch "
                "asks about many videos"
            )
            raise UsageError(f"ask takes one question, not {len(words)}: {shlex.join(words)}", hint)
        hint = f"quote the question: evoprune ask {there} {_quoted(' '.join(words))}; for more questions: -Q"
        if any(word.startswith("-") for word in words):
            hint = "words after -- are not options: put options before it"
        elif question is None and exists(last):
            quote = "" if is_question(name) else "quote the question and "
            hint = f"{quote}put it last: evoprune ask {there} {_quoted(' '.join(words))}"
        raise UsageError(f"unexpected extra words: {' '.join(words)}", hint)
    hint = "check the path"
    if name == last and question is None:
        hint += f"; to ask it as a question: -Q {name}"
    names = [shown(word) for word in missing if PATH.fullmatch(word)]
    raise VideoError(f"no such file: {some(names)}", missing_hint(name, hint))


def is_question(word: str) -> bool:
    """Return True if a word that is no input looks like a question: it was quoted, because it has spaces, or it ends with "?"."""
    return re.search(r"\s", word.strip()) is not None or word.endswith("?")


def check_no_questions(videos: Sequence[str], usage: str) -> None:
    """Raise VideoError if a question is in the place of a video, with an example of the right place in `usage`."""
    asked = [word for word in videos if not (exists(word) or looks_like_input(word)) and is_question(word)]
    if asked:
        message = f"no such file: {some(list(map(shown, asked)))}"
        raise VideoError(message, missing_hint(asked[0], f"put -Q before each question: {usage}"))


def check_not_swapped(command: str, inputs: Sequence[str], question: str | None) -> None:
    """Raise VideoError if the first words are a question, and all words after it are inputs."""
    asked = " ".join(takewhile(lambda word: not (exists(word) or looks_like_input(word)), inputs))
    rest = [word for word in inputs if exists(word) or looks_like_input(word)]
    if question is None and asked and rest:
        names = shlex.join(shown(without_password(word)) for word in rest)
        check_order(asked, rest, f"evoprune {command} {names} {_quoted(asked)}")


def check_not_model(word: str | None, usage: str) -> None:
    """Raise VideoError if the name of a model is in the place of a video.

    Args:
        usage: The command for the hint, up to the model.
    """
    if word is None or looks_like_input(word):
        return
    near = [word] if word.startswith("Qwen/") else get_close_matches(word.lower(), DEMOS, 1, 0.7)
    if near:
        raise VideoError(f"no such file: {word}", f"{near[0]} is a model: {usage} {near[0]}")


def check_folders(inputs: Sequence[str], questions: Sequence[str], model: str) -> None:
    """Raise VideoError if an input is a folder of videos, with the commands that ask about all its videos or about one of them."""
    for path in inputs:
        if not os.path.isdir(path) or not os.access(path, os.R_OK):
            continue
        inside = Folder(path)
        if inside.videos and not inside.images:
            one = f"evoprune ask {shlex.quote(inside.videos[0])} {_quoted(questions[0])}"
            asked = " ".join(f"-Q {_quoted(question)}" for question in questions)
            every = f"evoprune batch {shlex.quote(path)} {asked} -m {shlex.quote(model)} -o answers.jsonl"
            message = f"no images in the folder {path}, but {counted(len(inside.videos), 'video')}"
            raise VideoError(message, f"to ask about one: {one}; about each: {every}")


def _quoted(text: str) -> str:
    """Quote a question for the shell, in double quotes if possible."""
    return shlex.quote(text) if re.search(r'["$`\\!]', text) else f'"{text}"'
