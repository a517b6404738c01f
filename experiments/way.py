"""The way of a video to an answer: which classes of this project a default question instantiates, and which files its frames cross.

    python -m experiments.way [VIDEO QUESTION]

The demo model is loaded first. Then a video is opened, encoded and asked about, as `evoprune ask` does it; everything in the main
process counts, its threads too.

**Classes.** A class counts once, however many instances there are. They are counted in three groups: the way itself; options and
reports, which tell how and what was done; and the process that reads files, with the memory and the threads that it needs.

**Returns.** Data is an array, or a tensor of bytes or of floating-point numbers, alone or inside a collection or an object of this
project: frames, and what becomes of them. Whole numbers are indices, and parameters belong to the model.

- A call that hands data over takes the walk into the file of the function that is called. When that function ends, the walk is
  where it was before: this is no step.
- A function that was handed none and gives data takes the walk into the file of whoever gets it. So does a generator: it is handed
  nothing when it is called.
- A method that is handed nothing but its own object, such as `rows.place`, is asked about the data and does not take it anywhere.
- Each function counts once for each file that it is called from, so that loops count once.

The walk is the list of files in this order, each behind another one. A return is a file in the list that was there before. The same
is counted for packages. Left out is what serves all others and knows no video: errors, util, report, model (its clock and checks of
numbers), and backend, which computes for them as torch does.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from inspect import CO_GENERATOR, CO_VARARGS, CO_VARKEYWORDS
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import numpy as np
import torch

import evoprune
from evoprune import VideoQA

VIDEO = Path(__file__).parent.parent / "samples/square.mp4"
QUESTION = "What happens?"
PACKAGE = f"{Path(evoprune.__file__).parent}/"
# Modules whose classes tell of the way, and those of the process of the reader.
SAYING = ("language.settings", "session.options", "report")
READER = ("video.sandbox.channel", "video.sandbox.isolation")
MAKERS = ("__init__", "__new__")  # the first argument of one is the object, of the other the class
SERVING = ("errors", "util", "report", "model", "backend")  # what the walk leaves out
DEPTH = 2  # how far inside collections and objects data is looked for
FIRST = 8  # entries of a collection that are looked at

Note = Callable[[FrameType, str, Any], None]


@contextmanager
def noting(*notes: Note) -> Iterator[None]:
    """Have each of `notes` called at each call and return in all threads that start inside, as `sys.setprofile` does."""

    def note(frame: FrameType, event: str, value: Any) -> None:
        for each in notes:
            each(frame, event, value)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


class Made:
    """Counts how often each class of this project is instantiated, in the order of the first instances."""

    def __init__(self):
        self.classes: Counter[type] = Counter()
        self._known: dict[int, object] = {}  # by id, and held, so that no id is used again

    def __call__(self, frame: FrameType, event: str, _value: Any) -> None:
        code = frame.f_code
        if event != "call" or code.co_name not in MAKERS or not code.co_argcount:
            return
        given = frame.f_locals.get(code.co_varnames[0])
        kind = given if isinstance(given, type) else type(given)
        if not _is_ours(kind) or id(given) in self._known:
            return
        if given is not kind:  # a base class has an `__init__` of its own
            self._known[id(given)] = given
        self.classes[kind] += 1


class Walk:
    """Follows data from file to file, as described above. `files`: those that it crosses, in order."""

    def __init__(self):
        self.files: list[str] = []
        self._known: set[tuple[CodeType, str, str]] = set()
        self._handed: dict[int, bool] = {}  # whether a function that runs was handed data, by the id of its frame

    def __call__(self, frame: FrameType, event: str, value: Any) -> None:
        here = _file_of(frame)
        if here is None or event not in ("call", "return"):
            return
        if event == "call":
            self._handed[id(frame)] = _handed_data(frame)
            moves = self._handed[id(frame)]
        else:
            moves = not self._handed.pop(id(frame), False) and has_data(value)
        caller = _caller(frame)
        if not moves or caller in (None, here) or _asks_data(frame):
            return
        if (frame.f_code, event, caller) in self._known:
            return
        self._known.add((frame.f_code, event, caller))
        before, after = (caller, here) if event == "call" else (here, caller)
        if not self.files:
            self._enter(before)
        self._enter(after)

    def _enter(self, file: str) -> None:
        if not self.files or self.files[-1] != file:
            self.files.append(file)

    @property
    def packages(self) -> list[str]:
        """The packages that it crosses, in order."""
        names = [file.partition("/")[0] for file in self.files]
        return [name for number, name in enumerate(names) if names[:number][-1:] != [name]]


def returns(places: list[str]) -> int:
    """Return how often a walk comes back to a file, or a package, which it has left."""
    return len(places) - len(set(places))


def has_data(value: Any, depth: int = DEPTH) -> bool:
    """Return whether a value is data, or holds some."""
    if isinstance(value, torch.nn.Parameter | torch.nn.Module):
        return False
    if isinstance(value, torch.Tensor):
        return value.dtype == torch.uint8 or value.is_floating_point()
    if isinstance(value, np.ndarray):
        return value.dtype == np.uint8
    if not depth:
        return False
    inside = ()
    if isinstance(value, dict):
        inside = list(value.values())[:FIRST]
    elif isinstance(value, list | tuple):
        inside = value[:FIRST]
    elif _is_ours(type(value)):
        inside = list(getattr(value, "__dict__", {}).values())
    return any(has_data(each, depth - 1) for each in inside)


def _is_ours(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "evoprune"


def _arguments(frame: FrameType) -> dict[str, Any]:
    """Return what a function was given, by name, those of `*args` and `**kwargs` together."""
    code = frame.f_code
    collected = bool(code.co_flags & CO_VARARGS) + bool(code.co_flags & CO_VARKEYWORDS)
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + collected]
    values = frame.f_locals
    return {name: values[name] for name in names if name in values}


def _handed_data(frame: FrameType) -> bool:
    if frame.f_code.co_flags & CO_GENERATOR:
        return False
    return any(has_data(value) for value in _arguments(frame).values())


def _asks_data(frame: FrameType) -> bool:
    """Return whether a function is a method of data that is handed nothing else."""
    arguments = _arguments(frame)
    own = arguments.pop("self", None)
    return has_data(own) and not any(has_data(value) for value in arguments.values())


def _file_of(frame: FrameType) -> str | None:
    """Return the file of a function inside this package, such as `video/frames`; None if the walk leaves it out."""
    name = frame.f_code.co_filename
    if not name.startswith(PACKAGE):
        return None
    file = name.removeprefix(PACKAGE).removesuffix(".py")
    return None if file.partition("/")[0] in SERVING else file


def _caller(frame: FrameType) -> str | None:
    """Return the file of the nearest function that has called this one and is not left out."""
    above = frame.f_back
    while above is not None and _file_of(above) is None:
        above = above.f_back
    return None if above is None else _file_of(above)


def followed(video: str | Path = VIDEO, question: str = QUESTION) -> tuple[Counter[type], Walk]:
    """Return the classes that a default question about a video instantiates, with how many instances each has; and its walk."""
    qa = VideoQA.load("demo")
    made = Made()
    walk = Walk()
    with noting(made, walk):
        for _ in qa.ask(video, question):
            pass
    return made.classes, walk


def module_of(kind: type) -> str:
    """Return where a class is, in this project."""
    return kind.__module__.removeprefix("evoprune.")


def grouped(kinds: Iterable[type]) -> dict[str, list[type]]:
    """Return classes by their group."""
    groups: dict[str, list[type]] = {"the way itself": [], "options and reports": [], "the reader's process": []}
    names = dict.fromkeys(SAYING, "options and reports") | dict.fromkeys(READER, "the reader's process")
    for kind in kinds:
        group = names.get(module_of(kind), "the way itself")
        if kind.__name__.endswith("Options"):
            group = "options and reports"
        groups[group].append(kind)
    return groups


def main() -> None:
    made, walk = followed(*sys.argv[1:])
    for name, kinds in grouped(made).items():
        print(f"{name}: {len(kinds)} classes")
        for kind in kinds:
            print(f"  {module_of(kind):28} {kind.__qualname__:24} {made[kind]:4}")
    print(f"{len(made)} classes")
    for name, places in (("packages", walk.packages), ("files", walk.files)):
        print(f"{len(set(places))} {name}, {returns(places)} returns")
        for number, place in enumerate(places):
            print(f"  {place}{' (again)' if place in places[:number] else ''}")


if __name__ == "__main__":
    main()
