"""The classes of this project between a video and an answer: which a default question instantiates, in their order.

    python -m experiments.way [VIDEO QUESTION]

The demo model is loaded first. Then a video is opened, encoded and asked about, as `evoprune ask` does it; everything in the main
process counts, its threads too. A class counts once, however many instances there are.
"""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evoprune import VideoQA

VIDEO = Path(__file__).parent.parent / "samples/square.mp4"
QUESTION = "What happens?"
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


def main() -> None:
    made = made_by_a_question(*sys.argv[1:])
    for kind, count in made.items():
        print(f"{kind.__module__.removeprefix('evoprune.'):28} {kind.__qualname__:24} {count:4}")
    print(f"{len(made)} classes")


if __name__ == "__main__":
    main()
