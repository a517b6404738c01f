"""Add the lines of clips to a file, several processes side by side; a file that breaks off goes on where it ended."""

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import closing
from functools import partial

from evoprune.bench.processes import map_in_processes
from experiments.demo.write import clips_asked


def add_lines(args: argparse.Namespace, start: Callable[[str], Callable]) -> None:
    """Add to `args.output` the lines of JSON of the clips that it lacks, each of which names its "clip".

    Args:
        args: `world`, `split`, `block` and `clips` say which clips; `processes` how many work.
        start: called in each process with a folder for clips; returns the function that makes the lines of a clip.
    """
    there = args.output.read_text().splitlines() if args.output.exists() else []
    done = {json.loads(line)["clip"] for line in there}
    jobs = [clip for clip in clips_asked(args.world, args.split, args.block, args.clips) if str(clip) not in done]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        args.output.open("a") as file,
        closing(map_in_processes(partial(start, folder), jobs, args.processes)) as each,
    ):
        for number, made in enumerate(each, len(done) + 1):
            file.writelines(json.dumps(line, separators=(",", ":")) + "\n" for line in made)
            file.flush()
            print(f"{number} of {args.clips}", flush=True)
