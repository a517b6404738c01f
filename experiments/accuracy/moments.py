"""Measure how well `find` finds moments in long videos, by budget, and how well one prompt about the whole video does.

    python -m experiments.accuracy.moments -o runs/moments-shapes.jsonl --world shapes --split heldout --block 15 --minutes 60
    python -m experiments.accuracy.moments -o runs/moments-scenes.jsonl --world scenes --split heldout --block 15 --minutes 60
    python -m experiments.accuracy.moments runs/moments-shapes.jsonl runs/moments-scenes.jsonl
    python -m experiments.accuracy.moments -o hour.mp4 --world scenes --minutes 60

The first two forms add a line a file and way, and leave out what the output has, so that a run can be stopped and resumed. The
third prints tables. The last one writes a long video and says what is in it.

Each file is clips of a world, one after the other. It is asked for things that 0, 2.5, 5 and 10% of its clips show, for the moments
when two things appear and vanish, and in scenes for signs that say a word. A found moment is right if it overlaps a true one that
no better one has taken. Errors of start and end are of the right ones of things. False moments an hour are of things that the file
never shows.
"""

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median

from evoprune.bench.processes import map_in_processes
from evoprune.moments.search import Search, questions_for
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.options import FindOptions, ModelOptions, PruneOptions, SamplingOptions
from evoprune.session.session import Session
from experiments.demo.long_videos import WORLDS, Long, Query, Span, make_long, queries_of, write_long

MODELS = {"shapes": "demo", "scenes": "demo-scenes"}
BUDGETS = ("1", "0.4", "0.25", "0.1", "0.05")
ONE_PROMPT = "one prompt"
ONE_PROMPT_FRAMES = 24  # as the longest clips of a demo model's training have
THIRDS = ("early", "midway", "late")  # what the demo models answer to "when?"
Job = tuple[str, str, int, int, float, str]  # world, split, block, number and minutes of a file, and the way to find


def name_of(world: str, split: str, block: int, number: int, minutes: float) -> str:
    return f"{world}-{split}-{block}-{number}-{minutes:g}min"


def start(model: str, folder: str) -> Callable[[Job], list[dict]]:
    """Return what each process begins with: the function that makes the lines of a file."""
    loaded = load_model(ModelOptions(model, dtype="fp32", threads=1))
    return partial(lines_of, loaded, Path(folder))


def lines_of(loaded: LoadedModel, folder: Path, job: Job) -> list[dict]:
    """Return the line of a file and a way. The file stays for other ways."""
    world, split, block, number, minutes, way = job
    video = make_long(world, split, block, number, minutes)
    name = name_of(world, split, block, number, minutes)
    path = folder / f"{name}.mp4"
    if not path.exists():
        unfinished = folder / f"{name}-unfinished.mp4"
        write_long(world, video, unfinished)
        unfinished.replace(path)
    queries = queries_of(world, video, number)
    begun = time.perf_counter()
    if way == ONE_PROMPT:
        found = found_by_one_prompt(loaded, path, video, queries)
    else:
        found = found_by_search(loaded, path, way, queries)
    seconds = time.perf_counter() - begun
    asked = [
        {"kind": each.kind, "query": each.text, "true": each.moments, "found": found[each.text]} for each in queries
    ]
    return [{"file": name, "world": world, "way": way, "length_s": video.seconds, "asked": asked, "seconds": seconds}]


Found = dict[str, list[tuple[float, float, float]]]  # start, end and score of moments, by query


def found_by_search(loaded: LoadedModel, path: Path, budget: str, queries: Sequence[Query]) -> Found:
    """Return what `find` finds at a budget."""
    session = Session(loaded, PruneOptions(budget).config())
    found: Found = {query.text: [] for query in queries}
    with Search(session, str(path), list(found), FindOptions(top=1000), SamplingOptions()) as search:
        search.run()
        for moment in search.moments():
            found[moment.query].append((moment.start_s, moment.end_s, moment.score))
    return found


def found_by_one_prompt(loaded: LoadedModel, path: Path, video: Long, queries: Sequence[Query]) -> Found:
    """Return thirds of the video: of a thing that frames of the whole video show, that which an answer to "when?" names."""
    session = Session(loaded, PruneOptions("1").config())
    found: Found = {}
    with closing(open_inputs(session, [str(path)], SamplingOptions(frames=ONE_PROMPT_FRAMES))) as opened:
        encoded = opened.encode()
    for query in queries:
        found[query.text] = []
        questions = questions_for(session, FindOptions(), query.text)
        verb = "vanish" if query.text.endswith(" vanishes") else "appear"
        thing = query.text.removesuffix(" vanishes").removesuffix(" appears")
        if all((encoded.ask(text).text == "yes") == yes for text, yes in questions):
            answer = encoded.ask(f"When does the {thing} {verb}?").text
            if answer in THIRDS:
                third_s = video.seconds / 3
                start_s = THIRDS.index(answer) * third_s
                found[query.text].append((start_s, start_s + third_s, 1.0))
    return found


def matched(true: Sequence[Span], found: Sequence[Sequence[float]]) -> list[tuple[Span, Sequence[float]]]:
    """Return pairs of a true and a found moment that overlap, each in one pair: the best found first, with the longest overlap."""
    left = list(true)
    pairs = []
    for moment in sorted(found, key=lambda each: -each[2]):
        overlaps = [min(end, moment[1]) - max(start, moment[0]) for start, end in left]
        if overlaps and max(overlaps) > 0:
            pairs.append((left.pop(overlaps.index(max(overlaps))), moment))
    return pairs


def figures(lines: Iterable[dict], kind: str) -> dict[str, float | None]:
    """Return counts of true, found and right moments of a kind of query, and what follows from them; errors in seconds."""
    true = found = right = absent = 0
    hours = 0.0
    starts = []
    ends = []
    for line in lines:
        for each in line["asked"]:
            if each["kind"] != kind:
                continue
            pairs = matched(each["true"], each["found"])
            true += len(each["true"])
            found += len(each["found"])
            right += len(pairs)
            starts += [abs(moment[0] - span[0]) for span, moment in pairs]
            ends += [abs(moment[1] - span[1]) for span, moment in pairs]
            if not each["true"]:
                absent += len(each["found"])
                hours += line["length_s"] / 3600
    return {
        "true": true,
        "found": found,
        "precision": right / found if found else None,
        "recall": right / true if true else None,
        "f1": 2 * right / (true + found) if true + found else None,
        "start_s": median(starts) if starts else None,
        "end_s": median(ends) if ends else None,
        "false_per_hour": absent / hours if hours else None,
    }


def table(lines: Sequence[dict], kind: str) -> list[str]:
    """Return rows of Markdown: of each way the figures of a kind of query."""
    ways: dict[str, list[dict]] = defaultdict(list)
    for line in lines:
        ways[line["way"]].append(line)
    heads = (
        "way",
        "true",
        "found",
        "precision",
        "recall",
        "F1",
        "of F1 unpruned",
        "start, s",
        "end, s",
        "false an hour",
    )
    made = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    whole = figures(ways[BUDGETS[0]], kind)["f1"]
    for way in (*BUDGETS, ONE_PROMPT):
        if way not in ways:
            continue
        of = figures(ways[way], kind)
        shares = [_percent(of[name]) for name in ("precision", "recall", "f1")]
        kept = of["f1"] / whole if whole and of["f1"] is not None else None
        errors = ["" if of[name] is None else f"{of[name]:.2f}" for name in ("start_s", "end_s", "false_per_hour")]
        name = way if way == ONE_PROMPT else f"`-b {way}`"
        made.append(
            "| " + " | ".join([name, f"{of['true']}", f"{of['found']}", *shares, _percent(kept), *errors]) + " |"
        )
    return made


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"


def tables(lines: Sequence[dict]) -> str:
    """Return all tables of one world."""
    files = {line["file"]: line["length_s"] for line in lines}
    text = [f"{len(files)} files, {sum(files.values()) / 3600:.2f} hours"]
    for kind in ("thing", "event", "sign"):
        if any(each["kind"] == kind for line in lines for each in line["asked"]):
            text += ["", f"### {kind}", "", *table(lines, kind)]
    return "\n".join(text)


def read(path: Path) -> list[dict]:
    """Return the lines of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="lines to print tables of")
    parser.add_argument("--world", default="shapes", choices=WORLDS)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--block", type=int, default=65)
    parser.add_argument(
        "--count", type=int, default=1, help="how many files, at most 20 of a block (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=4.0, help="of each file (default: %(default)s)")
    parser.add_argument("--ways", default=",".join((*BUDGETS, ONE_PROMPT)), help="some of: %(default)s")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args(arguments)
    if args.files:
        for path in args.files:
            print(f"\n## {path.stem}\n\n{tables(read(path))}")
        return
    if args.output is None:
        parser.error("--output is needed, or files to print")
    if args.output.suffix == ".mp4":
        video = make_long(args.world, args.split, args.block, 0, args.minutes)
        write_long(args.world, video, args.output)
        for query in queries_of(args.world, video, 0):
            print(query.text, *(f"{start_s:.1f}-{end_s:.1f}" for start_s, end_s in query.moments))
        return
    done = {(line["file"], line["way"]) for line in read(args.output)} if args.output.exists() else set()
    jobs = []
    for number in range(args.count):
        of = (args.world, args.split, args.block, number, args.minutes)
        jobs += [(*of, way) for way in args.ways.split(",") if (name_of(*of), way) not in done]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        args.output.open("a", encoding="utf-8") as file,
        closing(map_in_processes(partial(start, MODELS[args.world], folder), jobs, args.processes)) as each,
    ):
        for made in each:
            file.write("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in made))
            file.flush()
            print(*(f"{line['file']} {line['way']} {line['seconds']:.0f} s" for line in made), flush=True)


if __name__ == "__main__":
    main()
