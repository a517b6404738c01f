"""Compare reading exact frames that lie close together: evoprune and torchcodec in turn.

    python -m experiments.speed.spans -o DIR

The time includes opening the file. The clips, and an environment with torchcodec, are created in DIR and kept.
"""

import argparse
from pathlib import Path
from statistics import median

from evoprune.backend import Device
from experiments.speed.first_word_clips import KINDS
from experiments.speed.first_word_readers import EXACT, make_environment
from experiments.speed.processes import Side, run_process
from experiments.tables import table

SPANS_S = (0.2, 1.0, 3.0)
FRAMES = 16
START_S = 31.3137  # no requested time coincides with a frame's timestamp
CLIP_S = 60
LIMIT_S = 60  # time limit for reading once, in seconds
OTHER = "torchcodec"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kinds", default="hd,uhd,vp9,screen", help="clips, of which `first_word_clips` has a list")
    parser.add_argument("--repeat", type=int, default=7, help="measured rounds; their median is shown (default: 7)")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "spans.log"
    python = make_environment(args.output / "readers")
    sides = {
        name: Side([str(python), "-m", "experiments.speed.first_word_readers", name], log) for name in (EXACT, OTHER)
    }
    rows = []
    for kind in args.kinds.split(","):
        path = args.output / f"{kind}.{KINDS[kind].ending}"
        if not path.exists():
            run_process(
                ["-m", "experiments.speed.first_word_clips", kind, str(path), "--seconds", str(CLIP_S)], log, 1800
            )
        for span_s in SPANS_S:
            times_s = [START_S + span_s * (number + 0.5) / FRAMES for number in range(FRAMES)]
            request = {"path": str(path), "kind": kind, "times_s": times_s, "part_s": span_s / FRAMES}
            took = {name: [] for name in sides}
            for number in range(args.repeat + 1):
                for name, side in sides.items():
                    found = side.ask(request, LIMIT_S)
                    # Matroska rounds times to milliseconds, so a frame may be on screen a little earlier.
                    if "error" in found or found["moved_s"] > 1.1 / KINDS[kind].fps:
                        raise SystemExit(f"{name}, {kind}: {found}")
                    if number:  # the first round is a warm-up
                        took[name].append(found["seconds"])
            ours, other = (median(seconds) for seconds in took.values())
            rows.append([KINDS[kind].title, f"{span_s:g}", f"{ours:.2f}", f"{other:.2f}", f"{other / ours:.2f}"])
    for side in sides.values():
        side.end()
    env = Device("cpu").environment()
    print(f"{env.device_name}, {env.threads} threads; {FRAMES} frames, {args.repeat} rounds, medians\n")
    print("\n".join(table(("clip", "span, s", f"{EXACT}, s", f"{OTHER}, s", "times as fast"), rows, numbers=True)))


if __name__ == "__main__":
    main()
