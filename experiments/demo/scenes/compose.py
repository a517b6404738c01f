"""Choose the content of a clip of scenes from a seed: its size, its length, its objects, and what happens to them.

Even seeds produce images, which consist of a single frame pair without events. Odd seeds produce videos. Each video has a plot,
which is its most frequent event type, so that questions that require more than one such event can be asked often enough.
"""

import math
from dataclasses import replace

import numpy as np

from experiments.demo.questions import pick
from experiments.demo.scenes.clip import COLOURS, MOTIONS, OUTLINES, SIGN, TEXTURES, Camera, Clip, Span, Thing
from experiments.demo.scenes.signs import draw_text, similar_text

SPLITS = {"train": 10, "validation": 11, "heldout": 12, "samples": 13}
# Frame sizes (height x width in units of 28 pixels) and lengths (in frame pairs) of evaluation clips, with their odds. The last two
# video frame sizes and the last two lengths are never used in training.
PICTURES = (((8, 12), 0.15), ((9, 16), 0.25), ((12, 18), 0.3), ((10, 14), 0.15), ((16, 24), 0.15))
FRAMES = (((8, 12), 0.4), ((12, 8), 0.1), ((9, 16), 0.2), ((12, 18), 0.15), ((10, 14), 0.1), ((16, 24), 0.05))
LENGTHS = ((4, 0.05), (8, 0.25), (12, 0.35), (16, 0.25), (6, 0.05), (10, 0.05))
FATES = ("stays", "appears", "vanishes", "flashes", "blinks", "turns")
PLOTS = {
    "quiet": ((0.85, 0.03, 0.03, 0.09, 0.0, 0.0), 0.3),  # probabilities of the fates, and fraction of moving objects
    "arrivals": ((0.6, 0.28, 0.03, 0.09, 0.0, 0.0), 0.1),
    "departures": ((0.6, 0.03, 0.28, 0.09, 0.0, 0.0), 0.1),
    "blinks": ((0.65, 0.03, 0.03, 0.09, 0.2, 0.0), 0.1),
    "changes": ((0.65, 0.03, 0.03, 0.09, 0.0, 0.2), 0.1),
    "traffic": ((0.85, 0.03, 0.03, 0.09, 0.0, 0.0), 0.5),
}
CUTS = 0.15  # fraction of videos with two scenes
PAGES = 0.3  # fraction of images that consist almost entirely of signs
SIGNS = 0.22, 0.85  # fraction of signs among objects, in most clips and in such images
UNITS_PER_THING = (5.0, 12.0)
MOST = 20


def family(seed: int) -> str:
    return "picture" if seed % 2 == 0 else "video"


def make_clip(split: str, seed: int) -> Clip:
    """Make clip number `seed` of a split. No two splits share a clip."""
    key = (SPLITS[split], seed)
    rng = np.random.default_rng((7, *key))
    still = family(seed) == "picture"
    if still:
        height, width = draw(rng, PICTURES)
        pairs = 1
    else:
        height, width = draw(rng, FRAMES)
        pairs = draw(rng, LENGTHS)
    return compose(key, height, width, pairs, float(pairs))


def draw(rng: np.random.Generator, choices):
    """Draw a random value from `((value, weight), ...)`, with probabilities proportional to the weights."""
    odds = np.array([odds for _, odds in choices])
    return choices[rng.choice(len(choices), p=odds / odds.sum())][0]


def compose(key: tuple[int, ...], height: int, width: int, pairs: int, seconds: float, crowd: float = 1.0) -> Clip:
    """Create a clip of `pairs` frame pairs with height x width units, and with `crowd` times the usual number of objects."""
    rng = np.random.default_rng(key)
    camera = Camera()
    if pairs > 1:
        camera = _camera(rng, width * 28, seconds)
    cut = math.inf
    if pairs >= 4 and rng.random() < CUTS:
        cut = float(rng.uniform(0.35, 0.65)) * seconds
        camera = Camera()
    count = int(np.clip(crowd * height * width / rng.uniform(*UNITS_PER_THING), 2, MOST * crowd))
    placer = _Placer(rng, Clip(key, height * 28, width * 28, seconds, pairs, (), camera, cut))
    odds, moving = list(PLOTS.values())[int(rng.integers(len(PLOTS)))]
    if pairs < 3 or cut < seconds:
        odds = (1.0, 0, 0, 0, 0, 0)
    if pairs == 1:
        moving = 0.0
    signs = SIGNS[pairs == 1 and rng.random() < PAGES]
    scenes = [(0.0, math.inf)]
    if cut < seconds:
        scenes = [(0.0, cut), (cut, math.inf)]
    for scene in scenes:
        placer.taken = []
        for number in range(max(2, count // len(scenes))):
            fate = FATES[rng.choice(len(FATES), p=np.array(odds) / sum(odds))]
            share = signs
            if number == 0:  # at least one sign in most scenes
                share = max(0.7, signs)
            sign = rng.random() < share
            placer.add(sign, fate, rng.random() < moving, scene)
    clutter = float(rng.uniform(0.1, 0.9))
    poles = 0
    if rng.random() < 0.15:
        poles = int(rng.integers(1, 4))
    noise = float(rng.uniform(1, 5))
    blur = int(rng.random() < 0.25)
    return replace(placer.clip, things=tuple(placer.things), clutter=clutter, poles=poles, noise=noise, blur=blur)


def _camera(rng: np.random.Generator, width: int, seconds: float) -> Camera:
    motion = draw(rng, (("still", 0.6), ("shake", 0.1), ("pan", 0.2), ("zoom", 0.1)))
    if motion == "pan":
        angle = int(rng.integers(4)) * np.pi / 2
        speed = rng.uniform(0.12, 0.25) * width / seconds
        return Camera("pan", float(round(speed * np.cos(angle), 3)), float(round(0.6 * speed * np.sin(angle), 3)))
    if motion == "zoom":
        far = float(rng.uniform(1.2, 1.4))
        if rng.random() < 0.5:
            return Camera("zoom", zoom=(1.0, far))
        return Camera("zoom", zoom=(far, 1.0))
    if motion == "shake":
        return Camera("shake", shake=float(rng.uniform(1, 2.5)))
    return Camera(motion)


class _Placer:
    """Places objects so that they can be identified: they have unique names, stay within the frame, and are never fully hidden."""

    def __init__(self, rng, clip: Clip):
        self.rng = rng
        self.clip = clip
        self.things: list[Thing] = []
        self.taken: list[int] = []  # the objects of this scene
        self.names: set[tuple] = set()

    def add(self, sign: bool, fate: str, moves: bool, scene: Span) -> None:
        spans = self._spans(fate, scene)
        turns = fate == "turns"
        turn = math.inf
        if turns:
            turn = float(self.rng.uniform(0.3, 0.7)) * self.clip.seconds
        for _ in range(8):
            look = self._sign(turns) if sign else self._shape(turns)
            name = look.outline, look.texture, look.colour
            texts = {text for t in self.things if t.is_sign for text in (t.text, t.after) if text}
            if name in self.names or (sign and {look.text, look.after} & texts):
                continue
            motion = "still"
            if moves:
                motion = pick(self.rng, *MOTIONS)
            thing = self._somewhere(replace(look, motion=motion, spans=spans, turn=turn))
            if thing is not None:
                self.names.add(name)
                self.taken.append(len(self.things))
                self.things.append(thing)
                return

    def _colour(self) -> tuple[str, tuple[int, ...]]:
        colour = pick(self.rng, *COLOURS)
        jitter = self.rng.integers(-14, 15, 3)
        return colour, tuple(min(max(c + int(d), 0), 255) for c, d in zip(COLOURS[colour], jitter, strict=True))

    def _sign(self, turns: bool) -> Thing:
        """Draw a random sign without a position. Its height is 8 to 24 pixels, usually small, and limited by the frame width."""
        colour = self._colour()
        text = draw_text(self.rng)
        most = min(24.0, 0.6 * self.clip.width / len(text) * 7 / 6)
        glyph = round(8 * (max(most, 8) / 8) ** float(self.rng.random() ** 1.3))
        after = ""
        if turns:
            after = similar_text(text, self.rng)
        if after == text:
            after = ""
        return Thing(SIGN, "plain", *colour, (glyph + 7) // 2, 0.0, 0.0, text=text, after=after)

    def _shape(self, turns: bool) -> Thing:
        rng = self.rng
        colour, rgb = self._colour()
        radius = int(min(8.0 * (1 - rng.random()) ** (-1 / 1.8), 26, 0.12 * (self.clip.height + self.clip.width)))
        outline = pick(rng, *OUTLINES)
        texture = pick(rng, *TEXTURES)
        after = ""
        if turns:
            after = pick(rng, *(c for c in COLOURS if c != colour))
        return Thing(outline, texture, colour, rgb, radius, 0.0, 0.0, after=after)

    def _spans(self, fate: str, scene: Span) -> tuple[Span, ...]:
        """Return the time spans during which an object with this fate is visible."""
        rng = self.rng
        seconds = self.clip.seconds
        step = seconds / self.clip.pairs
        if fate == "appears":
            return ((float(rng.uniform(0.2, 0.8)) * seconds, math.inf),)
        if fate == "vanishes":
            return ((0.0, float(rng.uniform(0.2, 0.8)) * seconds),)
        if fate == "flashes":
            length = float(rng.uniform(1.05, 1.6)) * step
            start = float(rng.uniform(0.4 * step, seconds - 0.4 * step - length))
            return ((start, start + length),)
        if fate == "blinks":
            gaps = int(rng.integers(1, 1 + min(4, int(seconds / step / 2.4))))
            # Visible and hidden spans have similar lengths, each longer than a frame pair.
            edges = np.linspace(0, seconds, 2 * gaps + 2)[1:-1] + rng.uniform(-0.08, 0.08, 2 * gaps) * step
            ends = [0.0, *(float(e) for e in edges), math.inf]
            return tuple(zip(ends[::2], ends[1::2], strict=True))
        return (scene,)

    def _somewhere(self, thing: Thing) -> Thing | None:
        """Place an object so that its path stays within the frame and hides nothing permanently. Returns None after 12 attempts."""
        clip = self.clip
        camera = self.clip.camera
        dx, dy = MOTIONS.get(thing.motion, (0, 0))
        room = clip.height - 2 * thing.radius
        if dx:
            room = clip.width - 2 * thing.half
        far = float(self.rng.uniform(0.35, 0.7)) * room
        if far < 24:
            thing = replace(thing, motion="still")
            dx, dy = 0, 0
        speed = 0.0
        if dx or dy:
            speed = far / clip.seconds
        # A zoom shows only the middle, and a pan moves objects at one edge out of the frame.
        rim = (1 - 1 / max(camera.zoom)) / 2
        for _ in range(12):
            place = []
            for way, pan, half, size in (
                (dx * speed, camera.dx, thing.half, clip.width), (dy * speed, camera.dy, thing.radius, clip.height),
            ):  # fmt: skip
                shift = (way - pan) * clip.seconds
                low = half + 2 + rim * size - min(0, shift)
                high = size - half - 2 - rim * size - max(0, shift)
                if low > high:
                    return None
                place.append(round(float(self.rng.uniform(low, high)), 2))
            made = replace(thing, x=place[0], y=place[1], speed=round(speed, 3))
            under = self._clear(made)
            if under is not None:
                return replace(made, under=under)
        return None

    def _clear(self, thing: Thing) -> int | None:
        """Return the index of the object beneath `thing`, -1 if there is none, or None if `thing` would hide too much."""
        under = -1
        for number in self.taken:
            other = self.things[number]
            least = math.inf
            shares = (0,)
            if thing.speed or other.speed:
                shares = (0, 0.25, 0.5, 0.75, 1)
            for share in shares:
                t = share * self.clip.seconds
                ax, ay = thing.centre(t)
                bx, by = other.centre(t)
                across = abs(ax - bx) / (thing.half + other.half)
                along = abs(ay - by) / (thing.radius + other.radius)
                least = min(least, max(across, along))
            if least >= 1.02:
                continue
            lie = all(not t.speed and not t.is_sign and t.event(self.clip.seconds) == "stays" for t in (thing, other))
            if not lie or under >= 0:
                return None
            if not 0.5 < least < 0.8 or max(thing.radius, other.radius) > 2.2 * min(thing.radius, other.radius):
                return None
            if other.under >= 0 or any(self.things[n].under == number for n in self.taken):
                return None
            under = number
        return under
