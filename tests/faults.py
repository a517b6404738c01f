"""Mutation testing by hand: plant one fault at a time and see whether a default test finds it.

    python -m tests.faults               # all faults
    python -m tests.faults rotation stop # some of them
    python -m tests.faults --list

Each fault is a mistake that changes a user's result but keeps the program running. The tool plants the fault in a temporary copy of
the tracked files. In this copy, it runs the tests that should find the fault and, if they pass, the whole default suite. The exit
code is 1 if a fault was not found. Run the suite without faults first, because a test that always fails finds every fault.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
ENDED = "a test that ended the process"  # for example a test that hangs for longer than faulthandler_timeout


class Fault(NamedTuple):
    """A mistake in one expression.

    Attributes:
        name: a word for the command line.
        file: the file that has the mistake.
        old: the correct text, which occurs once in the file.
        new: the wrong text.
        tests: the test files that run first, separated by spaces.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


# fmt: off
FAULTS = [
    # Frames come from the start of each part of the video instead of its middle.
    Fault("times", "evoprune/video/plan.py", "start_s + (i + 0.5) *", "start_s + i *", "tests/video/test_plan.py"),
    # A phone's portrait video is upside down.
    Fault("rotation", "evoprune/video/readers/ffmpeg.py", "np.rot90(rgb, -rotation_deg // 90)",
          "np.rot90(rgb, rotation_deg // 90)", "tests/video/test_frames.py"),
    # Frames are too early in a file whose clock does not start at 0.
    Fault("clock", "evoprune/video/readers/track.py", "stamp + shift_s - info.start_s", "stamp + shift_s",
          "tests/video/test_frames.py"),
    # The two frames of a pair come before the color channels.
    Fault("patches", "evoprune/vision/preprocess.py", "permute(0, 2, 5, 3, 6, 8, 1, 4, 7)",
          "permute(0, 2, 5, 3, 6, 1, 8, 4, 7)", "tests/vision/test_preprocess.py"),
    # The rotary embedding of the vision tower swaps rows and columns.
    Fault("rotary", "evoprune/vision/tower.py", "y, x = torch.meshgrid(", "x, y = torch.meshgrid(",
          "tests/vision/test_tower.py"),
    # Units are compared with the previous frame pair, so slow changes are never encoded.
    Fault("reuse", "evoprune/backend/operators.py", "held = torch.where(changed[:, None], now / gain, held)",
          "held = now / gain", "tests/vision/test_preprocess.py"),
    # A budget keeps one token less if its share of the tokens is not a whole number.
    Fault("budget", "evoprune/methods/budget.py", "math.floor(share * units + 0.5)", "math.floor(share * units)",
          "tests/methods/test_budget.py"),
    # The nearest points are selected instead of the farthest.
    Fault("farthest", "evoprune/methods/farthest.py", "order.topk(keep)", "order.topk(keep, largest=False)",
          "tests/methods/test_farthest.py"),
    # VisionZip keeps the tokens with the lowest attention.
    Fault("visionzip", "evoprune/contrib/visionzip.py", "highest(attention[here], round", "highest(-attention[here], round",
          "tests/contrib/test_selectors.py"),
    # The text after a video has the position of the video's last token.
    Fault("positions", "evoprune/language/prompt.py", "int(inside.max()) + 1", "int(inside.max())",
          "tests/language/test_prompt.py"),
    # An answer contains the stop string.
    Fault("stop", "evoprune/language/answer.py", "held_back[: held_back.index(self.found)]",
          "held_back[: held_back.index(self.found) + len(self.found)]", "tests/language/test_answer.py"),
    # The cache answers about a file that was replaced.
    Fault("cache", "evoprune/session/encoding.py", '"files": content,', '"files": plan.info.path,',
          "tests/session/test_cache.py"),
    # The warning about a damaged video depends only on the last chunk of frames.
    Fault("warning", "evoprune/session/encoding.py", "self.damaged += chunk.damaged", "self.damaged = chunk.damaged",
          "tests/session/test_patches.py"),
    # Statistics and progress are printed among the answers.
    Fault("stdout", "evoprune_cli/terminal.py", "file=sys.stderr, flush=True", "file=stdout(), flush=True",
          "tests/cli/test_ask.py"),
    # A batch that is resumed does not ask failed rows again.
    Fault("resume", "evoprune/batch/output.py", "if not earlier.failed:", "if earlier.id in by_id:",
          "tests/batch/test_run.py"),
    # A model keeps pruning after the with-block.
    Fault("context", "evoprune/hf/context.py", "self.remove()", "self._packed = None", "tests/hf/test_context.py"),
    # A stream drops the first frame of each window.
    Fault("window", "evoprune/live/windows.py", "slot < self._done or", "slot <= self._done or", "tests/live/test_stream.py"),
    # A moment of several segments ends with its best segment instead of its last one.
    Fault("moment", "evoprune/moments/search.py", "self.segments[run.last].end_s", "self.segments[run.best].end_s",
          "tests/moments/test_search.py"),
    # An answer that names two options counts as right if the later option is right.
    Fault("grade", "evoprune/bench/questions.py", "if len(named) != 1 or named == {-1}:", "if not named or named == {-1}:",
          "tests/bench/test_questions.py"),
    # A window is prefilled to its end while a question waits.
    Fault("giveway", "evoprune/live/gate.py", "if self._asking or self._problem:", "if self._problem:",
          "tests/live/test_gate.py"),
    # The encoder is not told that it may go on while an answer is generated.
    Fault("wakeup", "evoprune/live/gate.py", "self._answer = number\n            self._changed.notify_all()",
          "self._answer = number", "tests/live/test_gate.py"),
    # The server keeps the files of requests that have ended.
    Fault("files", "plugins/serve/evoprune_serve/work.py", "stack.callback(self.files.close)", "stack.callback(id, self.files)",
          "tests/plugins/serve/test_work.py"),
    # Products in 8 bits subtract the wrong zero point.
    Fault("int8", "evoprune/backend/cpu/quantize.py", "* -(levels() + 1)).float()", "* -levels()).float()",
          "tests/backend/cpu/test_quantize.py"),
]
# fmt: on


def plant(fault: Fault, folder: Path) -> None:
    """Copy the tracked files into a folder and plant a fault there."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():  # False for a file that is deleted, but not yet in a commit
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    path = folder / fault.file
    path.write_text(path.read_text().replace(fault.old, fault.new))


def first_failure(folder: Path, *arguments: str) -> str | None:
    """Run tests in a folder until one fails. Returns the node ID of the failed test, or None if all pass.

    Raises SystemExit: the tests cannot be run.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    env = os.environ | {"PYTHONPATH": str(folder)}  # for child processes with another working directory
    run = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if run.returncode in (0, 5):  # 5: none of these tests is in the default run
        return None
    if failed := re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", run.stdout, re.MULTILINE):
        return failed[1]
    if run.returncode == 1 or run.returncode < 0:
        return ENDED
    sys.exit(f"{' '.join(command)}\n{run.stdout[-2000:]}{run.stderr[-2000:]}")


def find(fault: Fault) -> str | None:
    """Return the node ID of the first default test that finds a fault, or None if no test does."""
    with TemporaryDirectory(prefix="evoprune-fault-") as name:
        folder = Path(name).resolve()
        plant(fault, folder)
        return first_failure(folder, *fault.tests.split()) or first_failure(folder, "-n", "auto")


def main() -> int:
    known = {fault.name: fault for fault in FAULTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault; default: all of them")
    parser.add_argument("--list", action="store_true", help="list the faults and exit")
    given = parser.parse_args()
    if unknown := set(given.names) - known.keys():
        parser.error(f"unknown fault: {', '.join(sorted(unknown))}; choose from {', '.join(known)}")
    chosen = [known[name] for name in given.names or known]
    counts = {fault: (ROOT / fault.file).read_text().count(fault.old) for fault in chosen}
    if wrong := [f"{fault.file} has {n} times, not once: {fault.old}" for fault, n in counts.items() if n != 1]:
        sys.exit("update tests/faults.py:\n" + "\n".join(wrong))
    if given.list:
        for fault in chosen:
            print(f"{fault.name:<10} {fault.file}: {fault.old}  ->  {fault.new}")
        return 0
    print("| fault | file | found by | seconds |\n|---|---|---|---|", flush=True)
    found = 0
    for fault in chosen:
        begun = time.monotonic()
        test = find(fault)
        found += test is not None
        print(f"| {fault.name} | {fault.file} | {test or '**nothing**'} | {time.monotonic() - begun:.0f} |", flush=True)
    print(f"\n{found} of {len(chosen)} found")
    return int(found < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
