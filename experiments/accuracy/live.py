"""Compare streams with whole files: accuracy at equal tokens, what a thinned memory costs, and two hours of memory and time.

    python -m experiments.accuracy.live -o results/watch.md --minutes 10 --hours 2

Clips are validation clips of both worlds. Each is read as a file, and fed frame by frame as a stream; the same questions are asked
at the end. `--minutes` is time of the processor, after which no further clip begins; the page says how many there were.
"""

import argparse
import math
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from evoprune.backend.devices import memory_in_use, reset_peak_memory
from evoprune.bench.questions import grade
from evoprune.session.loading.model import load_model
from evoprune.session.options import StreamOptions
from evoprune.video.frames import read_frames
from evoprune.video_qa import VideoQA
from experiments.accuracy.paired import in_points, paired_difference
from experiments.demo.write import clips_asked, demo_video

MODELS = {"shapes": "demo", "scenes": "demo-scenes"}
METHODS = ["evoprune", "adjacent", "evs", "evs-nofloor"]
FILE = "whole file"
# Windows of a clip (None: of the default length), the share of its tokens that the memory holds, seconds of an earlier window, and
# whether it is grey.
STREAMS = {
    "windows of 8 s": (None, 1.0, 0.0, True),
    "3 windows": (3, 1.0, 0.0, True),
    "6 windows": (6, 1.0, 0.0, True),
    "6 windows, 3/4 remembered": (6, 0.75, 0.0, True),
    "6 windows, 1/2 remembered": (6, 0.5, 0.0, True),
    "6 windows, 1/3 remembered": (6, 0.34, 0.0, True),
    "3 windows, after 8 s": (3, 1.0, 8.0, True),
    "3 windows, after 1 minute": (3, 1.0, 60.0, True),
    "3 windows, after 1 minute, turned": (3, 1.0, 60.0, False),
}
PLAIN = ("windows of 8 s", "3 windows", "6 windows")
PAGE = """# Live video

Made by `python -m experiments.accuracy.live -o results/watch.md --minutes {minutes:g} --hours {hours:g}`.

## The end of a stream against the whole file

{clips} validation clips, half of them of each world, with {questions:,} questions. Each clip was read as a file, and as a
stream that was fed its frames one after the other. Both were asked the same questions at the end. *tokens*: visual tokens that the
language model read, on average. *remembered*: the memory holds this share of the clip's tokens, so that its oldest windows are
thinned. *after*: a window began so long before, which is grey, or the end of the clip *turned* upside down and played backwards.
The difference to the file is in points, with its 95% interval over clips.

{tables}
A stream of one window is the file (tests/live/test_stream.py). Of several windows each selects among its own units and those
that have not changed since the window before, and has its share of the tokens. The bundled models know clips of seconds: an earlier
window stays only while both fit into the longest clip of their training, 24 s (`demo`) and 32 s (`demo-scenes`). So a window of a
minute ago has no tokens left. While it was kept, it cost 46 to 52 points, because its distance was outside of what they learned.

## Two hours

{hours_text}
"""


def accuracy(
    minutes: float, budgets: list[float], methods: list[str], only: str, plain: bool
) -> dict[tuple[str, str, float], dict[str, list[dict]]]:
    """The samples by world, method and budget, then by what was asked: the file or a stream. Of the first method all `STREAMS`."""
    loaded = {world: load_model(name) for world, name in MODELS.items()}
    samples: dict[tuple[str, str, float], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    clips = [clips_asked(world, "validation", 0, 1000) for world in MODELS]
    begun = time.process_time()
    with TemporaryDirectory() as folder:
        for pair in zip(*clips, strict=True):
            if time.process_time() - begun > 60 * minutes:
                break
            for clip in pair:
                with demo_video(clip, Path(folder)) as video:
                    for method, budget in product(methods, budgets):
                        qa = VideoQA(loaded[clip.world], budget=budget, method=method)
                        streams = [name for name in STREAMS if name.startswith(only)]
                        if plain or method != methods[0]:
                            streams = [name for name in streams if name in PLAIN]
                        for name, made in asked(qa, video, streams).items():
                            samples[clip.world, method, budget][name] += made
            print(f"{pair[0]}, {time.process_time() - begun:.0f} s", flush=True)
    return samples


def asked(qa: VideoQA, video, streams: list[str]) -> dict[str, list[dict]]:
    """Return the samples of a clip: of the file and of some of `STREAMS`."""
    of_file = qa.encode(video.path)
    plan = of_file.plan
    times = plan.sampling.times_s
    with closing(read_frames(plan.info, times)) as chunks:
        frames = np.concatenate([chunk.pixels.copy() for chunk in chunks])
    found = {FILE: answers(of_file, video)}
    step = plan.sampling.seconds_per_frame
    tokens = plan.encoder.keep
    for name in streams:
        windows, share, before_s, grey = STREAMS[name]
        length = StreamOptions.window_s / step
        if windows:
            length = len(times) / windows
        size = max(2, 2 * round(length / 2))
        least = 2 * math.ceil(tokens * min(1, size / len(times)))
        limit = {}
        if share < 1:
            limit["memory_tokens"] = max(least, math.floor(share * tokens))
        with qa.stream(fps=1 / step, window_s=size * step, **limit) as stream:
            start = math.ceil(before_s / (size * step)) * size * step  # at the beginning of a window
            if before_s:
                others = frames[::-1, ::-1, ::-1][:size]
                if grey:
                    others = np.full_like(others, 128)
                for number, frame in enumerate(others):
                    stream.add(frame, number * step)
                stream.flush()
            for number, frame in enumerate(frames):
                stream.add(frame, start + number * step)
            stream.flush()
            found[name] = answers(stream, video)
    return found


def answers(source, video) -> list[dict]:
    made = []
    for row in video.rows:
        answer = source.ask(row.prompt, max_new_tokens=32)
        right = bool(grade(row, answer.text))
        made.append({"video": video.name, "id": row.id, "right": right, "tokens": answer.report.tokens.visual})
    return made


def table(samples: dict[tuple[str, str, float], dict[str, list[dict]]]) -> str:
    lines = []
    for (world, method, budget), rows in sorted(samples.items(), key=lambda each: each[0][1] != METHODS[0]):
        lines += [
            f"### `{method}`, {world}, budget {budget:g}",
            "",
            "| | tokens | accuracy | difference to the file |",
            "|---|--:|--:|--:|",
        ]
        for name, made in rows.items():
            right, tokens = (np.mean([each[key] for each in made]) for key in ("right", "tokens"))
            difference = ""
            if name != FILE:
                difference = in_points(*paired_difference(made, rows[FILE]))
            lines.append(f"| {name} | {tokens:.1f} | {100 * right:.1f}% | {difference} |")
        lines.append("")
    return "\n".join(lines)


def hours_text(hours: float, method: str) -> str:
    """Return what the process holds and how long a question takes, every so often in a stream of that length, simulated faster."""
    loaded = replace(
        load_model("demo"), demo=None
    )  # as a model that may use all of its context: the answers say nothing
    qa = VideoQA(loaded, method=method, budget=0.25)
    rows = []
    begun = time.perf_counter()
    pictures = np.random.default_rng(0).integers(0, 256, (64, 112, 168, 3), dtype=np.uint8)
    every = max(300, 60 * round(hours * 60 / 12))
    with qa.stream() as stream:
        for second in range(round(3600 * hours)):
            for half in (0.0, 0.5):
                stream.add(pictures[(2 * second + int(2 * half)) * 7 % 64], second + half)
            if (second + 1) % every == 0:
                asked_at = time.perf_counter()
                next(stream.ask("What happens?", max_new_tokens=1), None)
                wait_ms = 1000 * (time.perf_counter() - asked_at)
                seen = stream.seen
                own = memory_in_use("cpu")[0]
                reset_peak_memory("cpu")  # which gives back what is free
                rows.append((second + 1, seen, own, memory_in_use("cpu")[0], wait_ms))
    seconds = time.perf_counter() - begun
    lines = [
        f"A stream of {hours:g} hours at two frames a second, windows of 8 s and a memory of 10 minutes, read by `demo` as by a "
        f"model that may use all of its context, as fast as it goes: {seconds:.0f} s. *own*: memory of the process that is not "
        "mapped from files, then without what the C library keeps of freed memory (`malloc_trim`).",
        "",
        "| time | tokens | windows, of them thinned | back to | own | in use | first token |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for at, seen, own, used, wait_ms in rows:
        back = (seen.end_s - seen.start_s) / 60
        held = f"{seen.windows}, {seen.thinned}"
        lines.append(
            f"| {at / 60:.0f} min | {seen.tokens:,} | {held} | {back:.0f} min | {own / 2**20:.0f} MiB | {used / 2**20:.0f} MiB "
            f"| {wait_ms:.0f} ms |"
        )
    growth, more = (100 * (max(row[column] for row in rows) / rows[0][column] - 1) for column in (3, 2))
    said = f"After the first row what is in use grows by {growth:.1f}% at most, and with what the C library keeps by {more:.1f}%."
    return "\n".join([*lines, "", said])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/watch.md"))
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--hours", type=float, default=2.0, help="0 for none")
    parser.add_argument("--only", default="", help="how the names of the streams begin that are asked")
    parser.add_argument("--plain", action="store_true", help="no thinned memories and no earlier windows")
    parser.add_argument("--method", type=lambda text: text.split(","), default=METHODS)
    parser.add_argument(
        "-b", "--budgets", type=lambda text: [float(each) for each in text.split(",")], default=[0.25, 0.1]
    )
    args = parser.parse_args()
    hours = hours_text(args.hours, args.method[0]) if args.hours else ""
    samples = accuracy(args.minutes, args.budgets, args.method, args.only, args.plain)
    rows = [rows[FILE] for key, rows in samples.items() if key[1:] == (args.method[0], args.budgets[0])]
    clips = len({each["video"] for made in rows for each in made})
    questions = sum(map(len, rows))
    facts = {"minutes": args.minutes, "hours": args.hours, "clips": clips, "questions": questions}
    page = PAGE.format(**facts, tables=table(samples), hours_text=hours)
    args.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
