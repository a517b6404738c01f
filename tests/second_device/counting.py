"""Count the device operations of an encode or a question exactly: `python -m tests.second_device.counting`.

Operations are calls that reach torch's dispatcher, including views. An evoprune operator is counted as a single operation. Copies
are copies of tensors to the host.
"""

import argparse
from collections import Counter
from traceback import extract_stack

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.second_device import far, plugin  # noqa: F401  before any import of evoprune

ITEM = "_local_scalar_dense"


class Counting(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, and the copies to the host.

    Attributes:
        operations: number of calls, by operator and, if `lines`, by the calling line of this package.
        copies: number of tensor copies to the host.
    """

    def __init__(self, lines: bool = False):
        super().__init__()
        self.lines, self.operations, self.copies = lines, Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        where, name = "", func._schema.name.removeprefix("aten::")
        if self.lines:
            frames = [f for f in extract_stack() if "/evoprune/" in f.filename]
            where = f"{frames[-1].filename.rpartition('/evoprune/')[2]}:{frames[-1].lineno}" if frames else "?"
        self.operations[where, name] += 1
        if isinstance(made, torch.Tensor) and made.device.type == "cpu":
            self.copies += name != ITEM and any(isinstance(x, far.Far) for x in args)
        return made


def encodes(qa, clip: str, lines: bool = False, prefill: bool = False, **frames) -> tuple[Counting, int]:
    """Return the counts and the number of waits of one encode (and prefill of a question), after a warm-up run."""
    from tests.waiting import Waiting

    def run() -> None:
        encoded = qa.encode(clip, **frames)
        if prefill:
            str(encoded.ask("What happens?", max_new_tokens=1))

    run()
    with Counting(lines) as counted:
        run()
    with Waiting() as waiting:
        run()
    return counted, len(waiting.places)


def main() -> None:
    import evoprune
    from evoprune.session import load_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="*", default=["samples/square.mp4", "samples/pan.mp4"])
    parser.add_argument("-b", "--budget", type=float, action="append")
    parser.add_argument("--method", action="append", help="default: evoprune")
    parser.add_argument("--frames", type=int)
    parser.add_argument("--prefill", action="store_true", help="to the first token, not to the end of encoding")
    parser.add_argument("--lines", type=int, default=0, help="print so many lines of code that call most operations")
    args = parser.parse_args()
    model = load_model("demo", device=far.NAME, dtype="fp32")
    how = {"prefill": args.prefill} | ({"frames": args.frames} if args.frames else {})
    print("| clip | method | budget | operations | of a budget of 1 | copies | waits |\n|---|---|---|---|---|---|---|")
    for clip in args.clips:
        base, _ = encodes(evoprune.VideoQA(model, budget=1.0, method="none"), clip, **how)
        for method in args.method or ["evoprune"]:
            for budget in args.budget or [0.25, 1.0]:
                qa = evoprune.VideoQA(model, budget=budget, method=method)
                counted, waits = encodes(qa, clip, bool(args.lines), **how)
                total = counted.operations.total()
                ratio = total / base.operations.total()
                print(
                    f"| {clip} | {method} | {budget:g} | {total:,} | {ratio:.2f} | {counted.copies} | {waits} |",
                    flush=True,
                )
                for (where, name), count in counted.operations.most_common(args.lines):
                    print(f"{count:6} {name} {where}")


if __name__ == "__main__":
    main()
