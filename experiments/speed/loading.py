"""Measure how long quantized weights take to load, and how much memory: `python -m experiments.speed.loading CKPT`.

Every start is a process of its own. The first one quantizes the weights and stores them in an empty folder, and the others load the
stored weights. Read the checkpoint once before, so that its files are in the page cache.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from experiments.speed.processes import ROOT, Sampler
from experiments.tables import table

SAMPLE_S = 0.05


class Watch(Sampler):
    """Records this process's largest memory, in bytes, during a `with` block.

    Attributes:
        own: The process's own memory.
        resident: Its memory including memory-mapped files.
    """

    def __init__(self):
        from evoprune.backend import Device

        super().__init__(SAMPLE_S)
        self.own = self.resident = 0
        self._device = Device("cpu")

    def sample(self) -> None:
        own, mapped = self._device.memory_in_use()
        self.own = max(self.own, own)
        self.resident = max(self.resident, own + mapped)


def load(args: argparse.Namespace) -> None:
    """Load the model in this process, and print the figures as JSON."""
    begun = time.perf_counter()
    from evoprune import VideoQA

    with Watch() as watch:
        VideoQA.load(args.checkpoint, quantize=args.quantize, threads=args.threads, offline=True)
        seconds = time.perf_counter() - begun
    print(json.dumps({"seconds": seconds, "own": watch.own, "resident": watch.resident}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--quantize", default="int8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        load(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.starts):
            ran = subprocess.run(  # noqa: S603 (this Python)
                [sys.executable, "-m", "experiments.speed.loading", "--once", *sys.argv[1:]],
                cwd=ROOT, env=os.environ | {"EVOPRUNE_CACHE_DIR": folder}, check=True, capture_output=True, text=True,
            )  # fmt: skip
            found = json.loads(ran.stdout.splitlines()[-1])
            own, resident = (f"{found[name] / 2**30:.1f}" for name in ("own", "resident"))
            rows.append([str(number + 1), f"{found['seconds']:.1f}", own, resident])
        stored = sum(file.stat().st_size for file in Path(folder).rglob("*.safetensors"))
    print("\n".join(table(("start", "s", "own memory, GiB", "with mapped files, GiB"), rows)))
    print(f"\nThe stored weights take {stored / 2**30:.1f} GiB.")


if __name__ == "__main__":
    main()
