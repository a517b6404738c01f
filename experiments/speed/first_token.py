"""Time the first token of evoprune and of plain transformers, each in processes of its own that take turns.

    python -m experiments.speed.first_token --dtype fp32 -b high,balanced,fast

`evoprune profile` holds the weights of both sides in one process, and where memory is short it cannot pack evoprune's. Here each
side has the memory to itself, and evoprune's weights are packed, as they are after some dozens of tokens. Dimensions are
those of the 3B model, weights are random, clip and clocks are those of `profile`. In each process the first turn of a row does
not count.
"""

import argparse
import json
import subprocess
import sys
from statistics import median

SIDES = HUGGING_FACE, EVOPRUNE = ("hugging_face", "evoprune")
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
TURNS = 2


def measure(side: str, args: argparse.Namespace) -> list[dict]:
    """Return the turns of one process: name, tokens, seconds of encode and prefill."""
    from evoprune.backend.cpu.linear import pack_waiting
    from evoprune.bench.clips import prepare, synthetic_frames
    from evoprune.bench.hugging_face import hugging_face_model
    from evoprune.bench.profile import run_evoprune, run_hugging_face
    from evoprune.bench.profile_results import Case
    from evoprune.session.loading.model import load_model
    from evoprune.session.options import PruneOptions
    from evoprune.vision.tower import tower_shape

    loaded = load_model(MODEL, dtype=args.dtype, load_format="dummy", pack=side == EVOPRUNE)
    case = Case(args.frames, 224, 336)
    clip = prepare(loaded, *synthetic_frames("motion", case))
    found = []
    if side == HUGGING_FACE:
        reference = hugging_face_model(loaded.model)
        turns = [("Hugging Face", lambda: run_hugging_face(loaded, reference, clip, 2))]
    else:
        pack_waiting(loaded.model)
        turns = []
        for name in args.method.split(","):
            for text in args.budget.split(","):
                config = PruneOptions(text, name).config()
                plan = config.plan(tower_shape(loaded.model.model.visual), clip.grid)
                turns.append((f"{name} -b {text}", lambda *how: run_evoprune(loaded, clip, *how, 2), plan, config))
    for name, run, *how in turns:
        for turn in range(1 + TURNS):
            made = run(*how)
            if turn:
                found.append(
                    {
                        "name": name,
                        "tokens": made.counts.tokens,
                        "live": made.counts.live_share,
                        "encode": made.sample.encode,
                        "prefill": made.sample.prefill,
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("-b", "--budget", default="full,high,balanced,fast")
    parser.add_argument("--method", default="evoprune")
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES, help="of the processes that this one starts")
    args = parser.parse_args()
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    made: dict[str, list[dict]] = {}
    for number in range(args.rounds):
        for side in SIDES:
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
            command = [sys.executable, "-m", "experiments.speed.first_token", *sys.argv[1:], "--side", side]
            process = subprocess.run(command, check=True, stdout=subprocess.PIPE)  # noqa: S603 (this Python)
            for turn in json.loads(process.stdout):
                made.setdefault(turn["name"], []).append(turn)
    reference = median(turn["encode"] + turn["prefill"] for turn in made["Hugging Face"])
    print("| | tokens | live | encode, s | prefill, s | first token, s | times as fast |", "|---" * 7 + "|", sep="\n")
    for name, turns in made.items():
        encode, prefill = (median(turn[stage] for turn in turns) for stage in ("encode", "prefill"))
        first = median(turn["encode"] + turn["prefill"] for turn in turns)
        cells = f"{turns[0]['tokens']} | {turns[0]['live']:.2f} | {encode:.2f} | {prefill:.2f} | {first:.2f}"
        print(f"| {name} | {cells} | {reference / first:.2f} |")


if __name__ == "__main__":
    main()
