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
    Fault("stop", "evoprune/language/stops.py", "held_back[: held_back.index(self.found)]",
          "held_back[: held_back.index(self.found) + len(self.found)]", "tests/language/test_answer.py"),
    # The cache answers about a file that was replaced.
    Fault("cache", "evoprune/session/encoding.py", '"files": content,', '"files": plan.info.path,',
          "tests/session/test_cache.py"),
    # The warning about a damaged video depends only on the last chunk of frames.
    Fault("warning", "evoprune/session/encoding.py", "damaged = sum(chunk.damaged for chunk in seen)", "damaged = seen[-1].damaged",
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
    # The time that a thread waited for another one counts twice.
    Fault("overlap", "evoprune/timeline.py", "overlap=_length(work) - covered", "overlap=_length(work)",
          "tests/test_timeline.py"),
    # A stage inside another one counts for both.
    Fault("nested", "evoprune/timeline.py", "                at = inner.end", "                at = inner.start",
          "tests/test_timeline.py"),
    # A worker process that still has a request is lent again.
    Fault("lent", "evoprune/video/sandbox/isolation.py", "kept = request.is_finished and len(_idle)", "kept = len(_idle)",
          "tests/video/test_isolation.py"),
    # After a crash, the request is retried in an old process.
    Fault("fresh", "evoprune/video/sandbox/isolation.py", "if not (fresh or variables):", "if not variables:",
          "tests/video/test_isolation.py"),
    # After a crash, frames that were already read come twice.
    Fault("twice", "evoprune/video/sandbox/isolation.py", "        skipped = done\n", "        skipped = 0\n",
          "tests/video/test_isolation.py"),
    # The times of a live source that was interrupted begin again at 0.
    Fault("outage", "evoprune/video/live.py", "base = last[0] + time.monotonic() - last[1] - time_s", "base = 0.0",
          "tests/video/test_live.py"),
    # An answer goes on after the next question has been asked.
    Fault("overtaken", "evoprune/session/answering.py", "if turn != inputs._turn:", "if turn > inputs._turn:",
          "tests/session/test_thoughts.py"),
    # An answer that consists of thoughts only looks complete.
    Fault("thoughts", "evoprune/session/answering.py", "elif report.thoughts and not report.answer and",
          "elif report.thoughts and report.answer and", "tests/session/test_thoughts.py"),
    # The token that the prompt produces counts as one that took time.
    Fault("rate", "evoprune/session/report.py", "(report.tokens.new or 0) - 1", "(report.tokens.new or 0)",
          "tests/session/test_video_qa.py"),
    # The text after a pruned prompt is one position too early.
    Fault("furthest", "evoprune/hf/batch.py", "furthest + 1 - used.cumsum(1)", "furthest - used.cumsum(1)",
          "tests/hf/test_generate.py"),
    # A pruned row is padded with placeholders instead of the padding token, so transformers looks for another video.
    Fault("padding", "evoprune/hf/batch.py", "ids=left(self.ids, self.pad_id)", "ids=left(self.ids, int(self.ids.max()))",
          "tests/hf/test_generate.py"),
    # A video that is read a second time comes from the store, although its file has changed.
    Fault("changed", "evoprune/session/patches.py", "return repr((state, plan.of_pixels", "return repr((plan.of_pixels",
          "tests/session/test_patches.py"),
    # The encoder does not let questions go first.
    Fault("calm", "evoprune/live/gate.py", "lambda: self._calms > calms or self.state is not State.PREFILLING",
          "lambda: True", "tests/live/test_gate.py"),
    # The end of an older answer lets the memory change under the current one.
    Fault("older", "evoprune/live/gate.py", "if number in (None, self._answer):", "if self._answer is not None:",
          "tests/live/test_gate.py"),
    # The server opens the inputs of a client that is gone, and keeps them.
    Fault("gone", "plugins/serve/evoprune_serve/work.py", "            if owned:\n                owned.close()\n", "",
          "tests/plugins/serve/test_work.py"),
    # The server answers a client that is gone.
    Fault("ended", "plugins/serve/evoprune_serve/work.py",
          "            if self._state is not State.ENDED:\n                self._send(event)",
          "            self._send(event)", "tests/plugins/serve/test_work.py"),
    # A prompt that begins like an earlier one, but goes on differently, gets the earlier one's state.
    Fault("prefix", "evoprune/language/prefix.py", "if each.common(ids) == each.length]", "if each.common(ids)]",
          "tests/session/test_chat.py"),
    # The grammar of an answer also applies to the thoughts.
    Fault("grammar", "evoprune/language/constraints.py", "        if self._thinks:\n            return None\n", "",
          "tests/session/test_schema.py"),
    # An empty time span is only noticed once the model has been loaded.
    Fault("span", "evoprune/video/plan.py", "(self.end_s < 0) == (self.start_s < 0):", "self.end_s < 0 and self.start_s < 0:",
          "tests/batch/test_rows.py"),
    # The timestamps of frame pairs without tokens stay in the prompt.
    Fault("timestamp", "evoprune/language/pruned.py", "stays[run.start : run.stop] = False",
          "stays[run.start : run.start] = False", "tests/session/test_qwen3.py"),
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
