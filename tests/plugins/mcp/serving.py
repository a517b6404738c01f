"""`evoprune mcp` as a process."""

import os
import sys
from pathlib import Path

SAMPLES = Path(__file__).parents[3] / "samples"
ROOT = SAMPLES.parent
COLOUR = "What colour is the square?"
REASON = "mcp is not installed: pip install ./plugins/mcp"
SLOW_S = 60  # how long it takes to encode a file whose name begins with "slow"
BEGUN = "the program has begun\n"  # only said with the variable SAY_BEGUN
ENCODES = "a file is encoded\n"
STOPPED = "encoding was stopped\n"
# The command without an installed entry point, with a model that reports what it encodes.
PROGRAM = f"""
import os, signal, sys
usual = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as the installed command does, however slow these imports are
if "SAY_BEGUN" in os.environ:
    print({BEGUN!r}, end="", file=sys.stderr, flush=True)
import time
from importlib.metadata import EntryPoint
from evoprune.errors import OutOfMemory
from evoprune_cli import main
entry = EntryPoint("mcp", "evoprune_mcp:mcp", main.COMMANDS)
main.plugged = lambda: {{"mcp": entry}}

from evoprune_mcp import videos
load = videos.load

def reporting(*given):
    print("what a library prints")
    time.sleep(float(os.environ.get("LOAD_S", 0)))
    session = load(*given)
    from evoprune import VideoQA
    encode = VideoQA.encode
    failed = set()  # the files that take too much memory the first time

    def reported(self, paths, progress, **options):
        name = os.path.basename(paths[0])
        print({ENCODES!r}, end="", file=sys.stderr, flush=True)
        if name == "large.mp4" and paths[0] not in failed:
            failed.add(paths[0])
            raise OutOfMemory("no memory", "use less")
        if name.startswith("bug"):
            raise RuntimeError("a bug\\nand more")
        steps = 20 * {SLOW_S} * name.startswith("slow")
        try:
            for step in range(steps):
                progress("read", step, steps)
                time.sleep(0.05)
        except BaseException:
            print({STOPPED!r}, end="", file=sys.stderr, flush=True)
            raise
        return encode(self, paths, progress=progress, **options)

    VideoQA.encode = reported
    return session

videos.load = reporting
from evoprune_cli.__main__ import start
signal.signal(signal.SIGINT, usual)
start()
"""


def command(*options: str, **variables: str) -> tuple[list[str], dict[str, str]]:
    """Return the command line of a server, and its environment."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "plugins" / "mcp"), *sys.path])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [sys.executable, "-c", PROGRAM, "mcp", *options], environment | variables
