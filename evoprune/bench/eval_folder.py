"""An evaluation's output folder, which contains settings.json, samples.jsonl, and results.json. Runs can be resumed from it."""

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

from evoprune.batch import check_size_rule
from evoprune.errors import UsageError
from evoprune.files import append, remove_unfinished, write_file
from evoprune.untrusted import read_object
from evoprune.util import differences, file_changes

SETTINGS = "settings.json"
SAMPLES = "samples.jsonl"
RESULTS = "results.json"
SIZE_RULE = "after_tower_below"  # name of a settings field that is omitted if the input size does not matter
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """A folder that stores the samples from one run.

    Attributes:
        samples: The samples from videos already finished when the folder was opened.
        model: The state of the model files (`ModelDescription.state`), or None if unknown.
        after_tower_below: The number of units below which inputs are pruned only after the vision tower on the run's device. 0 if
            inputs of all sizes are treated the same, or None if unknown.
    """

    def __init__(self, path: Path, samples: list[dict], model: dict[str, Any] | None, after_tower_below: int | None):
        self.path = path
        self.samples = samples
        self.model = model
        self.after_tower_below = after_tower_below

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any]) -> "RunFolder":
        """Create a new folder. If `path` already exists, a number is appended to its name: `path`-2, `path`-3, and so on.

        Raises:
            UsageError: If the folder cannot be created.
        """
        others = (path.with_name(f"{path.name}-{number}") for number in count(2))
        for place in chain([path], others):
            with _writing(place), suppress(FileExistsError):
                place.mkdir(parents=True)
                break
        folder = cls(place, [], settings.get("files"), settings.get(SIZE_RULE))
        folder._replace(SETTINGS, json.dumps(settings, indent=1) + "\n")
        return folder

    @classmethod
    def resume(cls, path: Path, settings: dict[str, Any]) -> "RunFolder":
        """Open an interrupted run's folder, dropping the samples of unfinished and failed videos.

        Raises:
            UsageError: If `path` is not a run folder, if its samples are damaged, or if the run used different settings or a
                different model.
        """
        before = stored_settings(path)
        file = path / SAMPLES
        now = json.loads(json.dumps(settings))
        model = before.pop("files", None)
        here = now.pop("files", None)
        below = before.pop(SIZE_RULE, 0)
        now.pop(SIZE_RULE, None)  # `check_size_rule` compares it later
        # In another folder, the same files have other names. The questions are compared by their hash, and the model by its files.
        if now.get("digest") and before.get("digest"):
            before["data"] = now.get("data")
        if model and here:
            before["model"] = now.get("model")
        try:
            text = file.read_bytes() if file.exists() else b""
        except OSError as problem:
            raise no_folder(path) from problem
        if change := differences(before, now):
            raise UsageError(
                f"{path} was started with other settings: {change}", "use the same settings, or a new -o DIR"
            )
        with _writing(path):
            for name in (SETTINGS, SAMPLES, RESULTS):
                remove_unfinished(str(path / name))
        samples = _finished(text, file)
        folder = cls(path, samples, model, below)
        folder.check_model(here)
        kept = "".join(map(_line, samples))
        if kept.encode() != text:
            folder._replace(SAMPLES, kept)
        return folder

    def check_model(self, state: dict[str, Any] | None) -> None:
        """Check that the model files have not changed since the run started. Raises UsageError if they have."""
        if change := file_changes(self.model, state):
            problem = f"the model has changed since {self.path} was started: {change}"
            raise UsageError(problem, "use the earlier model, or a new -o DIR")

    def check_size_rule(self, after_tower_below: int | None) -> None:
        """Check that the run started with the same size limit for pruning only after the tower. None means that the limit is
        unknown.

        Raises:
            UsageError: If the limit has changed.
        """
        check_size_rule(str(self.path), self.after_tower_below, after_tower_below)

    def add(self, samples: list[dict]) -> None:
        """Append a video's samples to the file atomically. They are on disk when this method returns.

        Raises:
            UsageError: If the file cannot be written.
        """
        samples[-1]["last"] = True
        path = self.path / SAMPLES
        with _writing(path), open(path, "ab", buffering=0) as file:
            append(file.fileno(), "".join(map(_line, samples)).encode())

    def finish(self, results: dict[str, Any]) -> None:
        self._replace(RESULTS, json.dumps(results, indent=1) + "\n")

    def _replace(self, name: str, text: str) -> None:
        with _writing(self.path / name):
            write_file(str(self.path / name), text.encode("ascii"))


def stored_settings(path: Path) -> dict[str, Any]:
    """Read the settings of the run stored in a folder.

    Raises:
        UsageError: If the folder does not contain a run.
    """
    try:
        # Earlier versions did not record the seek mode, because "exact" was the only mode.
        return {"seek": "exact"} | read_object(path / SETTINGS)
    except (OSError, ValueError) as problem:
        raise no_folder(path) from problem


def no_folder(path: Path) -> UsageError:
    return UsageError(f"{path} is not the folder of an evaluation", f"choose a folder that contains {SETTINGS}")


def _line(sample: dict) -> str:
    return json.dumps(sample, separators=(",", ":")) + "\n"


def _finished(text: bytes, path: Path) -> list[dict]:
    """Parse the samples from videos that finished without errors. Empty lines and an incomplete last line are ignored.

    Args:
        text: The contents of the samples file.
        path: The file, for the error message.

    Raises:
        UsageError: If another line is not a sample.
    """
    samples = []
    video = []
    lines = text.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip(b"\0 \t\r"):
            continue
        try:
            sample = json.loads(line)
            name = sample["video"]
            if video and video[-1]["video"] != name:
                video = []
        except (ValueError, KeyError, TypeError, RecursionError) as problem:
            if number == len(lines):
                break
            hint = "restore the line, or choose a new -o DIR"
            raise UsageError(f"{path}, line {number} is not a sample of an evaluation", hint) from problem
        video.append(sample)
        if sample.get("last"):
            if "error" not in sample:
                samples += video
            video = []
    return samples


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        hint = "free some space there" if problem.errno in FULL else "choose another place"
        raise UsageError(f"cannot write {path}: {problem.strerror}", hint) from problem
