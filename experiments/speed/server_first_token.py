"""Time the first token of a new video through `evoprune serve` and by `VideoQA`, in turn, as a Markdown table.

    python -m experiments.speed.server_first_token --repeat 31

A video is new because bytes follow its end, others each time: it is read and encoded. `VideoQA` is in this process and gets the
path of a file, the server in another one; each is idle while the other works, and has as many threads. In a stream the time ends
with the first chunk that has text. The first rounds do not count.
"""

import argparse
import base64
import json
import secrets
import sys
import time
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from evoprune.video_qa import VideoQA
from experiments.speed.server_load import ASKED, CHAT, SAMPLES, body, row, served

CLIP = "square.mp4"
WARM = 3
STAGES = ("queue", "plan", "read", "encode", "prefill")


@dataclass(frozen=True)
class First:
    """Milliseconds to the first token, and those of the stages that the report has."""

    wall: float
    stages: dict[str, float]


def new_clip() -> bytes:
    """Return a sample with a box at its end that readers skip, and that no other one has."""
    return (SAMPLES / CLIP).read_bytes() + (24).to_bytes(4, "big") + b"free" + secrets.token_bytes(16)


def own(qa: VideoQA, path: Path) -> First:
    path.write_bytes(new_clip())
    begin = time.perf_counter()
    answer = qa.encode(path).ask(ASKED[CLIP])
    next(answer)
    wall = 1000 * (time.perf_counter() - begin)
    for _ in answer:  # the report is complete with the answer
        pass
    times = answer.report.time_ms
    return First(wall, {name: getattr(times, name, None) or 0.0 for name in STAGES})


def asked(connection: HTTPConnection, url: str) -> First:
    data = body(url, ASKED[CLIP], stream=True, stream_options={"include_usage": True})
    begin = time.perf_counter()
    connection.request("POST", CHAT, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    for line in response:
        if line.startswith(b"data: ") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
            break
    wall = 1000 * (time.perf_counter() - begin)
    *_, last = [line for line in response.read().splitlines() if line.startswith(b"data: {")]
    times = json.loads(last[6:])["usage"]["evoprune"]["time_ms"]
    return First(wall, {name: times[name] or 0.0 for name in STAGES})


def measure(repeat: int) -> dict[str, list[First]]:
    qa = VideoQA.load("demo", threads="auto")
    found: dict[str, list[First]] = {"VideoQA": [], "server, data: in the request": [], "server, file:": []}
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = folder / "clip.mp4"
        with served(folder, "--allow-dir", temporary, "-q") as server, closing(server.connection(0)) as connection:
            for _ in range(WARM + repeat):
                sides = [lambda: own(qa, path)]
                url = "data:video/mp4;base64," + base64.b64encode(new_clip()).decode()
                sides.append(lambda url=url: asked(connection, url))
                sides.append(lambda: asked(connection, path.as_uri()))
                for side, times in zip(sides, found.values(), strict=True):
                    times.append(side())
                    time.sleep(0.05)  # the sides leave threads that spin for a moment
    return {name: times[WARM:] for name, times in found.items()}


def table(found: dict[str, list[First]]) -> str:
    """Return medians in ms, and the median of each round's difference to `VideoQA`."""
    lines = [
        row("first token of a new video, ms", "median", "later than VideoQA", *STAGES),
        "|---|--:|--:|" + "--:|" * len(STAGES),
    ]
    base = found["VideoQA"]
    for name, times in found.items():
        later = median(each.wall - first.wall for each, first in zip(times, base, strict=True))
        stages = (f"{median(each.stages[stage] for each in times):.1f}" for stage in STAGES)
        lines.append(row(name, f"{median(each.wall for each in times):.1f}", f"{later:+.1f}", *stages))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=31)
    parser.add_argument("-o", type=Path, metavar="FILE", help="also write the table to this file")
    options = parser.parse_args(argv)
    text = table(measure(options.repeat))
    print(text)
    if options.o:
        options.o.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
