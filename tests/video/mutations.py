"""Reads randomly damaged videos: `python -m tests.video.mutations [--count 1000] [--seed 0]`.

Small files of many kinds are mutated. The case number and the seed determine the mutations. Each mutated file is probed, sampled
and decoded as by `ask`, and some files are passed to the command line itself. The result must be an answer or an error about the
video, and it must come within `LONGEST_S`. The program prints a summary of the results and exits with code 1 if any result was
wrong.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from evoprune.errors import EvopruneError, VideoError
from evoprune.video.frames import choose_decoder, probe, read_chunks
from evoprune.video.plan import InputLimits, Plan
from evoprune.video.sandbox import isolation
from tests.decoders import DECODERS
from tests.video.files import numbered_frame, numbered_frames, write_image, write_video
from tests.video.kinds import KINDS, write_kind

ROOT = Path(__file__).parents[2]
LONGEST_S = 30.0
CHUNK_BYTES = 2**26  # the same size as in the pipeline
# Memory limit for the reader process: the limit for a video, plus memory for libraries and stacks.
MOST_BYTES = 2**30 + 2**28
# Every `DECORD_EVERY`-th case is read with decord, and every `COMMAND_EVERY`-th case is run on the command line.
DECORD_EVERY, COMMAND_EVERY = 7, 50

FASTSTART = "faststart.mp4"
SOURCES = (
    FASTSTART, "h264.mp4", "fragments.mp4", "h264.ts", "h264.avi", "h264.flv", "h264.h264", "hevc.mp4", "hevc.mkv", "vp8.webm",
    "vp9.webm", "vp9.ivf", "av1.mp4", "av1.mkv", "mpeg4.avi", "mjpeg.avi", "mpeg2.mpg", "mpeg2.mxf", "wmv2.wmv", "prores.mov",
    "picture.gif", "picture.apng", "ffv1.mkv", "sorenson.flv", "turned.mp4", "subtitles.mkv", "no_length.mkv",
    "image.png", "image.jpg", "image.webp", "image.bmp",
)  # fmt: skip

Mutation = Callable[[np.random.Generator, bytearray], bytes | bytearray]


def flip_bytes(random: np.random.Generator, content: bytearray) -> bytearray:
    for at in random.integers(len(content), size=random.integers(1, 40)):
        content[at] ^= random.integers(1, 256)
    return content


def damage_the_header(random: np.random.Generator, content: bytearray) -> bytearray:
    for at in random.integers(min(len(content), 600), size=random.integers(1, 12)):
        content[at] = random.integers(256)
    return content


def damage_the_end(random: np.random.Generator, content: bytearray) -> bytearray:
    """Overwrite bytes near the end of a file, where MP4 has its index."""
    for at in random.integers(min(len(content), 1000), size=random.integers(1, 12)):
        content[-1 - at] = random.integers(256)
    return content


def truncate(random: np.random.Generator, content: bytearray) -> bytearray:
    return content[: random.integers(1, len(content))]


def some_range(random: np.random.Generator, content: bytearray) -> tuple[int, int]:
    return tuple(sorted(random.integers(len(content), size=2)))


def cut_the_middle_out(random: np.random.Generator, content: bytearray) -> bytearray:
    begin, end = some_range(random, content)
    return content[:begin] + content[end:] or content


def zero_a_range(random: np.random.Generator, content: bytearray) -> bytearray:
    begin, end = some_range(random, content)
    return content[:begin] + bytes(end - begin) + content[end:]


def repeat_a_range(random: np.random.Generator, content: bytearray) -> bytearray:
    begin, end = some_range(random, content)
    return content[:end] + content[begin:end] * int(random.integers(1, 20)) + content[end:]


def swap_boxes(random: np.random.Generator, content: bytearray) -> bytearray:
    """Swap two boxes if the file is an MP4, or two arbitrary pieces of any other file."""
    edges, at = [0], 0
    while content[4:8] == b"ftyp" and at + 8 <= len(content):
        at += max(8, int.from_bytes(content[at : at + 4], "big"))
        edges.append(min(at, len(content)))
    if len(edges) < 4:
        edges = [0, *sorted(int(at) for at in random.integers(len(content), size=4)), len(content)]
    pieces = [content[a:b] for a, b in pairwise(edges)]
    i, j = random.choice(len(pieces), 2, replace=False)
    pieces[i], pieces[j] = pieces[j], pieces[i]
    return bytearray().join(pieces)


HUGE = (2**32 - 1, 2**31 - 1, 2**31, 10**9, 10**5, 65_535, 2**24, 0)


def declare_huge_numbers(random: np.random.Generator, content: bytearray) -> bytearray:
    """Write huge numbers near the beginning or end of a file, where sizes and counts are stored."""
    for _ in range(random.integers(1, 6)):
        size, order = int(random.choice([2, 4, 4, 8])), str(random.choice(["big", "little"]))
        at = int(random.integers(min(len(content), 800)))
        at = at if random.integers(2) else max(0, len(content) - at - size)
        number = int(random.choice(HUGE)) & (256**size - 1)
        content[at : at + size] = number.to_bytes(size, order)
    return content


MUTATIONS: tuple[Mutation, ...] = (
    flip_bytes, damage_the_header, damage_the_end, truncate, cut_the_middle_out, zero_a_range, repeat_a_range, swap_boxes,
    declare_huge_numbers,
)  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """The result of reading one mutated file."""

    number: int
    name: str  # the original file and its mutations
    code: int  # exit code of `ask`
    what: str  # the error message, with paths and numbers removed
    seconds: float
    peak_bytes: int | None  # peak memory of the reader process; None if it has exited
    bad: str  # why this result is wrong, or an empty string


def sources(folder: Path) -> dict[str, bytes]:
    """Write the files to mutate, and return a dict from file names to contents."""
    made = {}
    for name in SOURCES:
        if name in KINDS:
            path = write_kind(folder, name)
        elif name == FASTSTART:
            sound = {"audio_s": 4.0, "container_options": {"movflags": "faststart"}}
            path = write_video(folder / name, numbered_frames(40), **sound)
        else:
            path = write_image(folder / name, numbered_frame(77))
        made[name] = path.read_bytes()
    return made


def mutant(number: int, seed: int, originals: dict[str, bytes]) -> tuple[str, bytes]:
    """Return the name of a case and the contents of its mutated file."""
    random = np.random.default_rng((seed, number))
    name = SOURCES[number % len(SOURCES)]
    content, how = bytearray(originals[name]), []
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        mutation = MUTATIONS[random.integers(len(MUTATIONS))]
        content = bytearray(mutation(random, content) or b"\0")
        how.append(mutation.__name__)
    return f"{name}: {', '.join(how)}", bytes(content)


def read(path: Path, decoder: str) -> tuple[int, str]:
    """Read a file with the same steps as `ask`. Returns the exit code and the error message."""
    try:
        info = probe(path)
        choose_decoder(decoder, info)
        plan = Plan.of(info, InputLimits())
        chunk_bytes = min(CHUNK_BYTES, 16 * info.width * info.height * 3)
        frames = damaged = 0
        for chunk in read_chunks(info, plan.sampling.times_s, decoder=decoder, chunk_bytes=chunk_bytes):
            frames, damaged = frames + len(chunk.pixels), damaged + chunk.damaged
    except EvopruneError as problem:
        return problem.exit_code, re.sub(r"[0-9][0-9.,e+-]*", "N", problem.message.replace(str(path), "FILE"))
    except Exception as problem:
        return 1, f"{type(problem).__name__}: {problem}"
    if frames != plan.sampling.frames:
        return 1, f"{frames} frames instead of {plan.sampling.frames}"
    return 0, "answered, damaged" if damaged else "answered, cut short" if info.cut_short else "answered"


def command(path: Path) -> tuple[int, str]:
    """Run `ask` on a file. Returns the exit code, and a description of what is wrong with the output, or an empty string."""
    words = ["ask", str(path), "What happens?", "-n", "1", "--quiet", "--json"]
    done = subprocess.run([sys.executable, "-m", "evoprune_cli", *words], capture_output=True, cwd=ROOT, timeout=300)
    if b"Traceback" in done.stderr or len(done.stdout.splitlines()) != 1:
        return done.returncode, f"it wrote {done.stdout!r} and {done.stderr!r}"
    error = json.loads(done.stdout)["error"]
    if (error["code"] if error else 0) != done.returncode:
        return done.returncode, f"it ended with {done.returncode}, but wrote {error}"
    return done.returncode, ""


def run(number: int, seed: int, originals: dict[str, bytes], folder: Path, by_command: bool) -> Outcome:
    """Run one case. The mutated file is left in `folder`."""
    name, content = mutant(number, seed, originals)
    kind = name.partition(":")[0]
    path = folder / f"{number}_{kind}"
    path.write_bytes(content)
    video = path
    if kind.startswith("image") and number % 2:
        video = folder / f"{number}_images"
        video.mkdir(exist_ok=True)
        path.rename(video / kind)
    decoder = "decord" if number % DECORD_EVERY == 0 and "decord" in DECODERS else "auto"
    code, what, seconds, most = timed(video, decoder)
    if seconds > LONGEST_S:  # measure again, because the machine may have been busy
        code, what, seconds, most = timed(video, decoder)
    bad = ""
    if code not in (0, VideoError.exit_code):
        bad = what
    elif seconds > LONGEST_S:
        bad = f"it took {seconds:.0f} s"
    elif most is not None and most > MOST_BYTES:
        bad = f"it took {most / 2**20:.0f} MiB"
    elif by_command and decoder == "auto":
        by, bad = command(video)
        if by != code:
            bad = bad or f"the command line ends with {by}, not with {code}"
    return Outcome(number, name, code, what, seconds, most, bad)


def timed(path: Path, decoder: str) -> tuple[int, str, float, int | None]:
    """Read a file and return the fields `code`, `what`, `seconds` and `peak_bytes` of its `Outcome`."""
    for worker in isolation._idle:
        Path(f"/proc/{worker.pid}/clear_refs").write_text("5")  # resets the peak memory
    begin, peaks = time.monotonic(), []
    code, what = read(path, decoder)
    seconds = time.monotonic() - begin
    for worker in isolation._idle:
        status = Path(f"/proc/{worker.pid}/status").read_text()
        peaks += [int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")]
    return code, what, seconds, max(peaks, default=None)


def table(outcomes: Sequence[Outcome]) -> str:
    lines = ["| exit code | what | cases | longest | most memory |", "|---|---|---|---|---|"]
    counts = Counter((o.code, o.what) for o in outcomes)
    for (code, what), count in sorted(counts.items(), key=lambda found: (found[0][0], -found[1])):
        some = [o for o in outcomes if (o.code, o.what) == (code, what)]
        longest, most = max(o.seconds for o in some), max(o.peak_bytes or 0 for o in some)
        lines.append(f"| {code} | {what[:90]} | {count:,} | {longest:.1f} s | {most / 2**20:.0f} MiB |")
    return "\n".join(lines)


def run_all(numbers: Sequence[int], seed: int, folder: Path) -> Iterator[Outcome]:
    """Run all cases and yield their outcomes. If an outcome is wrong, the mutated file is left in `folder`."""
    (folder / "sources").mkdir(exist_ok=True)
    originals = sources(folder / "sources")
    for i, number in enumerate(numbers):
        outcome = run(number, seed, originals, folder, by_command=i % COMMAND_EVERY == COMMAND_EVERY - 1)
        if not outcome.bad:
            for path in folder.glob(f"{number}_*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield outcome


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="how many cases (default: 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the cases (default: 0)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        outcomes = list(run_all(range(args.count), args.seed, Path(temporary)))
    for outcome in outcomes:
        if outcome.bad:
            print(outcome, file=sys.stderr)
    print(table(outcomes))
    bad = sum(bool(outcome.bad) for outcome in outcomes)
    print(f"\n{len(outcomes):,} cases, {bad} of them bad; {max(o.seconds for o in outcomes):.1f} s at most")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
