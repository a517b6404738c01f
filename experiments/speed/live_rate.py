"""Time how fast a stream is encoded and read, against the same window as a file, and how long a question waits.

    python -m experiments.speed.live_rate -m CKPT --minutes 10     # CKPT: `checkpoint` writes one of the 3B model
    python -m experiments.speed.live_rate -m demo --minutes 1 --size 112x168

The source is in memory, gives frames at their time, and has `--load` times as many as the machine can encode, so that it must skip.
First without questions, then with one every `--every` seconds. To be run alone on the machine. The reference is `encode` and
`prefill` of a file of `--frames` frames, as `evoprune profile` measures it, before and after.
"""

import argparse
import itertools
import time
from statistics import median

import numpy as np

from evoprune.backend.limits import keep_freed_memory
from evoprune.live.feed import LiveFeed
from evoprune.video_qa import VideoQA

QUESTION = "What happens in this video?"


class Paced:
    """A source of moving frames at their time, until it is closed."""

    def __init__(self, height: int, width: int, seconds: float):
        self.facts = {}
        generator = np.random.default_rng(0)
        scene = generator.integers(0, 256, (height // 14 + 40, width // 14 + 40, 3), dtype=np.uint8)
        self._scene = scene.repeat(14, 0).repeat(14, 1)
        self._size = (height, width)
        self._seconds = seconds
        self._closed = False

    def frame(self, number: int) -> np.ndarray:
        """Frame after frame, the scene moves."""
        height, width = self._size
        y, x = number * 5 % 500, number * 9 % 500
        return self._scene[y : y + height, x : x + width].copy()

    def frames(self, due):
        begun = time.monotonic()
        for number in itertools.count():
            at = due()
            if self._closed or at > self._seconds:
                return
            time.sleep(max(0.0, begun + at - time.monotonic()))
            yield at, self.frame(number)

    def close(self) -> None:
        self._closed = True


def of_file(qa: VideoQA, source: Paced, frames: int, step_s: float) -> tuple[float, int]:
    """Seconds of encode and prefill of so many frames, read as one window, the median of three after one that does not count; and
    how many of the frames the limits let through."""
    found = []
    for _ in range(4):
        with qa.stream(window_s=frames * step_s, fps=1 / step_s) as stream:
            for number in range(frames - 1):
                stream.add(source.frame(number), number * step_s)
            begun = time.perf_counter()
            stream.add(source.frame(frames - 1), (frames - 1) * step_s)
            stream.flush()
            found.append(time.perf_counter() - begun)
            looked = stream.seen.frames
    return median(found[1:]), looked


def run(qa: VideoQA, source: Paced, window_s: float, fps: float, every_s: float | None, memory_s: float) -> dict:
    """One stream to its end, with questions or without."""
    waits = []
    own = []
    recoveries = []
    lags = []
    stream = qa.stream(window_s=window_s, fps=fps, memory_s=memory_s)
    begun = time.monotonic()
    asked_at = time.monotonic()
    with LiveFeed(stream, source, window_s) as feed:
        feed.begun.wait()
        while not feed.ended.wait(0.1):
            lags.append(feed.backlog.lag_s)
            if every_s and time.monotonic() - asked_at >= every_s and stream.seen:
                asked_at = time.monotonic()
                usual = max(lags[-round(10 * window_s) :])
                answer = stream.ask(QUESTION, max_new_tokens=16)
                next(answer)
                waits.append(time.monotonic() - asked_at)
                own.append(answer.report.time_ms.prefill / 1000)
                for _ in answer:
                    pass
                answered = time.monotonic()
                while feed.backlog.lag_s > usual + 0.5 and not feed.ended.wait(0.1):
                    pass
                recoveries.append(time.monotonic() - answered)
        seconds = time.monotonic() - begun
        seen = stream.seen
        skipped = feed.backlog.skipped
        feed.check()
    facts = {"rate": seen.frames / seconds, "seen": seen, "skipped": skipped, "lag": max(lags), "waits": waits}
    return facts | {"own": own, "recoveries": recoveries}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("-b", "--budget", type=float, default=0.25)
    parser.add_argument("--method", default="evoprune")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantize", default="none")
    parser.add_argument("--threads", default="auto")
    parser.add_argument("--size", default="280x392", help="height x width, so much that the model makes them no larger")
    parser.add_argument("--frames", type=int, default=16, help="of a window, where nothing is skipped")
    parser.add_argument("--load", type=float, default=1.25)
    parser.add_argument("--minutes", type=float, default=10.0, help="without questions")
    parser.add_argument("--asked-minutes", type=float, default=5.0, help="with questions")
    parser.add_argument("--memory", type=float, default=600.0, help="seconds of the stream that are remembered")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two questions")
    args = parser.parse_args()
    keep_freed_memory()  # as `watch` does
    how = {"dtype": args.dtype, "quantize": args.quantize, "threads": args.threads}
    qa = VideoQA.load(args.model, budget=args.budget, method=args.method, **how)
    height, width = map(int, args.size.split("x"))
    reference, frames = of_file(qa, Paced(height, width, 0), args.frames, 0.5)
    print(
        f"{frames} frames of {args.size} as one window: {reference:.2f} s, {frames / reference:.2f} a second",
        flush=True,
    )
    window_s = reference / args.load  # its frames come in less time than it takes
    fps = frames / window_s
    runs = ((None, args.minutes), (args.every, args.asked_minutes))
    for every_s, minutes in ((every_s, minutes) for every_s, minutes in runs if minutes):
        found = run(qa, Paced(height, width, 60 * minutes), window_s, fps, every_s, args.memory)
        ratio = found["rate"] * reference / frames
        print(
            f"{'no questions' if every_s is None else f'a question every {every_s:g} s'}, windows of {window_s:.2f} s, "
            f"{minutes:g} minutes: {found['rate']:.2f} frames a second, {ratio:.2f} of the reference; "
            f"{found['seen'].frames:,} looked at, {found['skipped']:,} skipped, {found['seen'].tokens:,} tokens at the end, "
            f"lag at most {found['lag']:.1f} s",
            flush=True,
        )
        if found["waits"]:
            waits = found["waits"]
            own = found["own"]
            print(
                f"{len(waits)} questions: first token {median(waits):.2f} s (at most {max(waits):.2f}), of them reading it "
                f"{median(own):.2f} s; the lag is as before after {median(found['recoveries']):.1f} s (at most "
                f"{max(found['recoveries']):.1f})"
            )
    again, _ = of_file(qa, Paced(height, width, 0), args.frames, 0.5)
    print(f"the reference again: {again:.2f} s")


if __name__ == "__main__":
    main()
