"""The classes of this project between a video and an answer: which a default question instantiates, in their order.

    python -m experiments.way [VIDEO QUESTION]

The demo model is loaded first. Then a video is opened, encoded and asked about, as `evoprune ask` does it; everything in the main
process counts, its threads too. A class counts once, however many instances there are.

They are counted in three groups: the way itself; options and reports, which tell how and what was done; and the process that reads
files, with the memory and the threads that it needs.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from evoprune import VideoQA

VIDEO = Path(__file__).parent.parent / "samples/square.mp4"
QUESTION = "What happens?"
# Modules whose classes tell of the way, and those of the process of the reader.
SAYING = ("language.settings", "session.options", "report")
READER = ("video.sandbox.channel", "video.sandbox.isolation")
MAKERS = ("__init__", "__new__")  # the first argument of one is the object, of the other the class


@contextmanager
def classes_made() -> Iterator[Counter[type]]:
    """Count how often each class of this project is instantiated, in all threads that start inside, in the order of the first."""
    made: Counter[type] = Counter()
    known: dict[int, object] = {}  # by id, and held, so that no id is used again

    def note(frame, event: str, _) -> None:
        code = frame.f_code
        if event != "call" or code.co_name not in MAKERS or not code.co_argcount:
            return
        given = frame.f_locals.get(code.co_varnames[0])
        kind = given if isinstance(given, type) else type(given)
        if kind.__module__.split(".")[0] != "evoprune" or id(given) in known:
            return
        if given is not kind:  # a base class has an `__init__` of its own
            known[id(given)] = given
        made[kind] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield made
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def made_by_a_question(video: str | Path = VIDEO, question: str = QUESTION) -> Counter[type]:
    """Return the classes that a default question about a video instantiates, with how many instances each has."""
    qa = VideoQA.load("demo")
    with classes_made() as made:
        for _ in qa.ask(video, question):
            pass
    return made


def module_of(kind: type) -> str:
    """Return where a class is, in this project."""
    return kind.__module__.removeprefix("evoprune.")


def grouped(kinds: Iterable[type]) -> dict[str, list[type]]:
    """Return classes by their group."""
    groups: dict[str, list[type]] = {"the way itself": [], "options and reports": [], "the reader's process": []}
    names = dict.fromkeys(SAYING, "options and reports") | dict.fromkeys(READER, "the reader's process")
    for kind in kinds:
        groups[names.get(module_of(kind), "the way itself")].append(kind)
    return groups


def main() -> None:
    made = made_by_a_question(*sys.argv[1:])
    for name, kinds in grouped(made).items():
        print(f"{name}: {len(kinds)} classes")
        for kind in kinds:
            print(f"  {module_of(kind):28} {kind.__qualname__:24} {made[kind]:4}")
    print(f"{len(made)} classes")


if __name__ == "__main__":
    main()
