"""The models that come with the package, by name: where each is, what it was trained on, and in which words. No numpy."""

import re
from dataclasses import dataclass
from pathlib import Path

_WEIGHTS = Path(__file__).parent


@dataclass(frozen=True)
class Demo:
    """Describe a demo model: its folder, and the world, a generator of clips, that it knows (docs/demo-model.md)."""

    folder: Path
    world: str
    inputs: int  # the most that a prompt of its training had
    span: int  # positions in time of the longest clip of its training: two a second


DEMOS = {
    "demo": Demo(_WEIGHTS / "demo", "shapes", inputs=1, span=48),
    "demo-scenes": Demo(_WEIGHTS / "demo-scenes", "scenes", inputs=2, span=64),
}


def demo_in(folder: Path | None) -> Demo | None:
    return next((demo for demo in DEMOS.values() if folder and demo.folder.resolve() == folder.resolve()), None)


WORDS = {  # by the world that a model knows; of scenes with the words of options, and of the request for a letter
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
# What signs say: it is read letter by letter, so every word in capitals and every number may be asked about.
SIGN = re.compile(r"[A-Z]{3,6}|\d+")


def unknown_words(question: str, world: str) -> list[str]:
    """Return the words of a question that no question of the training on a world has, in order and in lower case."""
    signs = world == "scenes"
    words = (word for word in re.findall(r"\w+", question) if not (signs and SIGN.fullmatch(word)))
    return [word for word in map(str.lower, words) if word not in WORDS[world]]
