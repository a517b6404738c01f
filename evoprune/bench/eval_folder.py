"""The output folder of an evaluation. It contains settings.json, samples.jsonl and results.json, and a run can resume from it."""

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
SIZE_RULE = "after_tower_below"  # name of a settings field that is missing if the device has no such rule
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """A folder that stores the samples of one run.

    Attributes:
        samples: samples from the videos that were already finished when the folder was opened.
        model: the state of the model's files (`ModelDescription.state`), or None if it is unknown.
        after_tower_below: inputs with fewer units than this are pruned only after the tower on the run's device. 0 means that no
            input is, and None means that the limit is unknown.
    """

    def __init__(self, path: Path, samples: list[dict], model: dict[str, Any] | None, after_tower_below: int | None):
        self.path = path
        self.samples = samples
        self.model = model
        self.after_tower_below = after_tower_below

    @classmethod
    def create(cls, path: Path, settings: dict[str, Any]) -> "RunFolder":
        """Create a new folder at `path` or, if `path` exists, at `path`-2, `path`-3 and so on.

        Raises:
            UsageError: the folder cannot be created.
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
        """Open the folder of an interrupted run. Samples from unfinished and failed videos are dropped.

        Raises:
            UsageError: `path` is not the folder of a run, or that run used different settings or a different model.
        """
        before = stored_settings(path)
        file = path / SAMPLES
        now = json.loads(json.dumps(settings))
        model = before.pop("files", None)
        here = now.pop("files", None)
        below = before.pop(SIZE_RULE, 0)
        now.pop(SIZE_RULE, None)  # `check_size_rule` compares it later
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
        samples = _finished(text)
        folder = cls(path, samples, model, below)
        folder.check_model(here)
        kept = "".join(map(_line, samples))
        if kept.encode() != text:
            folder._replace(SAMPLES, kept)
        return folder

    def check_model(self, state: dict[str, Any] | None) -> None:
        """Raise UsageError if the model's files have changed since the run started."""
        if change := file_changes(self.model, state):
            problem = f"the model has changed since {self.path} was started: {change}"
            raise UsageError(problem, "use the earlier model, or a new -o DIR")

    def check_size_rule(self, after_tower_below: int | None) -> None:
        """Raise UsageError if the run started with a different limit. None means that the limit is unknown."""
        check_size_rule(str(self.path), self.after_tower_below, after_tower_below)

    def add(self, samples: list[dict]) -> None:
        """Append a video's samples to the file, either all of them or none. They are on disk when this method returns.

        Raises:
            UsageError: the file cannot be written.
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
    """Return the settings of the run that is stored in a folder.

    Raises:
        UsageError: the folder contains no run.
    """
    try:
        # Earlier versions did not record the mode, because there was only this one
        return {"seek": "exact"} | read_object(path / SETTINGS)
    except (OSError, ValueError) as problem:
        raise no_folder(path) from problem


def no_folder(path: Path) -> UsageError:
    return UsageError(f"{path} is not the folder of an evaluation", f"choose a folder that contains {SETTINGS}")


def _line(sample: dict) -> str:
    return json.dumps(sample, separators=(",", ":")) + "\n"


def _finished(text: bytes) -> list[dict]:
    """Return the samples of all videos that finished without an error. Reading stops at the first incomplete line."""
    samples = []
    video = []
    for line in text.splitlines():
        try:
            sample = json.loads(line)
        except ValueError:
            break
        if video and video[-1]["video"] != sample["video"]:
            video = []
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
