"""Measure a model with its real weights: equality with transformers, speed, and accuracy on public benchmarks.

    python -m experiments.real Qwen/Qwen2.5-VL-7B-Instruct -o RESULTS                  # everything
    python -m experiments.real MODEL -o RESULTS --plan                                 # only hours and gigabytes
    python -m experiments.real MODEL -o RESULTS --benchmarks mvbench --questions 100   # one benchmark, fewer questions
    python -m experiments.real demo-scenes -o RESULTS --benchmarks clips,clips-subtitles --questions 40   # a trial

| part | measures |
|---|---|
| verify | whether evoprune computes what transformers computes, without pruning (`evoprune verify`) |
| speed | time to the first word, and tokens per second, at each budget (`evoprune ask`, alternating, medians) |
| a benchmark | accuracy of each row, judged by lmms-eval, and its difference from the answers without pruning |

The rows are the model without pruning, and each method at each budget below 1. By default, the methods are `evoprune`, `vidcom2`,
a random selection from each frame pair, and `idpruner` if there is a scorer (`--scorer FOLDER`; the demo models have their own).

The benchmarks run in an environment with lmms-eval, which is created in RESULTS/environment unless `--python` names one. lmms-eval
downloads the videos to HF_HOME, and asks for a token (HF_TOKEN) where a dataset requires one. A run can be stopped with Ctrl-C or
killed at any time; the same command continues it. If a part fails, the others still run, and the next run tries it again.
RESULTS/report.md and RESULTS/report.json are written after each part. See docs/reproduce.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2

from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneError, UsageError
from evoprune.session import ModelOptions, PruneOptions, describe
from experiments.environments.__main__ import RECIPES, block_of
from experiments.real import page
from experiments.real.clips import write_clips
from experiments.real.plan import (
    BASELINE,
    BENCHMARKS,
    DEFAULT,
    ENVIRONMENT_GIB,
    GIB,
    Settings,
    benchmarks_of,
    download_bytes,
    hours,
    is_here,
    rows_of,
)

ROOT = Path(__file__).parents[2]
METHODS = ("evoprune", "idpruner", "vidcom2", "random")
QUESTION = "Describe what happens in this video."
ROUNDS = 3
NEW_TOKENS = 64
PROBE_TOKENS = 8
CHECK = "import lmms_eval, evoprune_lmms_eval.model"


class Failed(Exception):
    """A part that failed: what went wrong, and a hint, on two lines."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.real", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL", help="a hub ID, a folder, or a demo model")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="RESULTS", help="folder for all results")
    parser.add_argument(
        "--benchmarks", default=",".join(DEFAULT), metavar="NAMES", help=f"from {', '.join(BENCHMARKS)}"
    )
    parser.add_argument("--questions", type=int, default=300, metavar="N", help="questions per benchmark (300)")
    parser.add_argument("--seed", type=int, default=0, help="determines the sample of questions (0)")
    parser.add_argument("--budgets", default="1,0.25,0.1", help="shares of the visual tokens (1,0.25,0.1)")
    parser.add_argument("--methods", metavar="NAMES", help="separated by spaces; default: see above")
    parser.add_argument("--scorer", metavar="FOLDER", help="a scorer for idpruner")
    parser.add_argument("--frames", type=int, default=64, help="frames per video (64)")
    parser.add_argument("--device", default="auto", help="as in evoprune ask")
    parser.add_argument("--dtype", default="auto", help="as in evoprune ask")
    parser.add_argument(
        "--python", type=Path, metavar="FILE", help="a Python with lmms-eval and evoprune's plugin for it"
    )
    parser.add_argument("--plan", action="store_true", help="print hours and gigabytes, and stop")
    return parser.parse_args(argv)


def settings_of(options: argparse.Namespace) -> Settings:
    """Check the options. Raises UsageError."""
    benchmarks = benchmarks_of(options.benchmarks)
    try:
        budgets = [float(word) for word in options.budgets.split(",")]
    except ValueError:
        raise UsageError(
            f"--budgets {options.budgets} is not a list of numbers", "example: --budgets 1,0.25,0.1"
        ) from None
    if not all(0 < budget <= 1 for budget in budgets):
        raise UsageError(f"--budgets {options.budgets}: a budget is above 0 and at most 1", "example: 1,0.25,0.1")
    if options.questions < 1 or options.frames < 1:
        raise UsageError(
            "--questions and --frames must be at least 1", "leave them out for 300 questions and 64 frames"
        )
    methods = options.methods.split() if options.methods else [*METHODS]
    if options.scorer:
        methods = [f"idpruner:scorer={options.scorer}" if method == "idpruner" else method for method in methods]
    elif not options.methods and options.model not in DEMOS:
        methods.remove("idpruner")
        say("idpruner is left out, because no scorer is named (--scorer FOLDER)")
    rows = rows_of(methods, budgets)
    for row in rows:
        PruneOptions(budget=row.budget, method=row.method).config()  # raises UsageError
    folder = Path(options.model).expanduser()
    return Settings(
        model=str(folder.resolve()) if folder.is_dir() else options.model,
        rows=rows,
        benchmarks=benchmarks,
        questions=options.questions,
        seed=options.seed,
        sampling={"frames": options.frames},
        loading={"device": options.device, "dtype": options.dtype},
    )


def evoprune(*arguments: str) -> dict[str, Any]:
    """Run a command of evoprune that prints JSON. Raises Failed with the two lines that the command prints."""
    command = [sys.executable, "-m", "evoprune_cli", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode not in (0, 7):  # 7: `verify` found a difference, which is a result
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise Failed(
            "\n".join(lines[-2:]).removeprefix("error: ")
            or f"evoprune {arguments[0]} ended with exit code {done.returncode}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def model_options(settings: Settings) -> list[str]:
    return ["-m", settings.model, "--device", settings.loading["device"], "--dtype", settings.loading["dtype"]]


def ask(settings: Settings, clip: Path, row: Any, tokens: int) -> dict[str, Any]:
    pruning = ["--method", row.method, "-b", f"{row.budget:g}"]
    sampling = ["--frames", str(settings.sampling["frames"]), "-n", str(tokens)]
    return evoprune("ask", str(clip), QUESTION, *model_options(settings), *pruning, *sampling)


def write(path: Path, results: Any) -> None:
    made = path.with_name(f"{path.name}.writing")
    made.write_text(json.dumps(results, indent=1), encoding="utf-8")
    made.replace(path)


def speed(settings: Settings, clip: Path) -> dict[str, Any]:
    """Ask with each budget in turn, each time in a process of its own."""
    rows = [BASELINE, *(row for row in settings.rows if row.method == "evoprune")]
    samples: dict[str, list[dict[str, Any]]] = {row.name: [] for row in rows}
    for number in range(ROUNDS):
        for row in rows:
            say(f"speed: round {number + 1} of {ROUNDS}, {row.name}")
            record = ask(settings, clip, row, NEW_TOKENS)
            samples[row.name].append(
                {
                    "first_word_s": record["time_ms"]["ttft_wall"] / 1000,
                    "load_s": record["time_ms"]["load"] / 1000,
                    "tokens_per_s": record["rate"]["generate_tok_s"],
                    "visual_tokens": record["tokens"]["visual"],
                    "peak_bytes": record["memory"]["peak_bytes"],
                    "env": record["env"],
                    "model": record["model"],
                }
            )
    first = samples[BASELINE.name][0]
    return {
        "env": first["env"],
        "model": first["model"] | {"id": page.public_name(first["model"]["id"])},
        "question": QUESTION,
        "frames": settings.sampling["frames"],
        "rows": {
            name: {key: median([each[key] for each in runs]) for key in page.SPEED} for name, runs in samples.items()
        },
    }


def median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def make_environment(folder: Path) -> Path:
    """Return the Python of an environment with lmms-eval, which is created unless it is complete.

    Raises:
        Failed: If it cannot be created.
    """
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if (folder / "complete").exists():
        return python
    say("creating an environment with lmms-eval, which takes a few minutes")
    log = folder.with_name("environment.log")
    paths = os.environ | {"PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    with log.open("w", encoding="utf-8") as out:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            ["bash", "-e", "-c", block_of(*RECIPES["lmms-eval"].block)],
            [str(python), str(ROOT / RECIPES["lmms-eval"].make[-1])],
        ):
            done = subprocess.run(command, cwd=ROOT, env=paths, stdout=out, stderr=out, check=False)  # noqa: S603
            if done.returncode:
                raise Failed(
                    f"lmms-eval could not be installed: {last_line(log)}\n"
                    f"see {log}; or name an environment that has it with --python"
                )
    (folder / "complete").touch()
    return python


def check_python(python: Path) -> None:
    """Raise Failed if a Python lacks lmms-eval or the plugin."""
    try:
        done = subprocess.run([str(python), "-c", CHECK], capture_output=True, text=True, check=False)  # noqa: S603
    except OSError as error:
        raise Failed(
            f"{python} cannot be run: {error.strerror}\nhint: leave out --python to have an environment created"
        ) from None
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise Failed(
            f"{python} has no lmms-eval with evoprune's plugin: {lines[-1] if lines else 'unknown error'}\n"
            "hint: leave out --python to have an environment created"
        )


def last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1][:300] if lines else "no output"


def run_benchmark(name: str, python: Path, folder: Path) -> dict[str, Any]:
    """Run a benchmark in the environment with lmms-eval, and show its progress. Raises Failed."""
    log = folder / f"{name}.log"
    command = [str(python), str(Path(__file__).with_name("answers.py")), str(folder), name]
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=out, text=True) as process,  # noqa: S603
    ):
        try:
            for line in process.stdout:
                if line.rstrip().endswith(("answers", "left", "the model")):
                    say(f"{name}: {line.rstrip()}")
                else:
                    out.write(line)
        except KeyboardInterrupt:
            process.terminate()
            raise
    if process.returncode:
        raise Failed(f"{name}: {last_line(log)}\nhint: see {log}; the same command tries again")
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def sizes(settings: Settings) -> tuple[dict[str, int], dict[str, str]]:
    """Return the bytes to download for each benchmark, and the benchmarks that cannot be reached, with the reasons."""
    found, unreachable = {}, {}
    for name in settings.benchmarks:
        benchmark = BENCHMARKS[name]
        if is_here(benchmark):
            found[name] = 0
            continue
        try:
            found[name] = download_bytes(benchmark)
        except (OSError, ValueError, httpx2.HTTPError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            unreachable[name] = f"{benchmark.dataset} cannot be reached: {reason}"
    return found, unreachable


def question_seconds(settings: Settings, clip: Path) -> float:
    """Ask one question without pruning, and return the seconds that it took after loading. Raises Failed."""
    say("asking one question without pruning, to estimate the time")
    record = ask(settings, clip, BASELINE, PROBE_TOKENS)
    return record["time_ms"]["total"] / 1000


def print_plan(settings: Settings, question_s: float, found: dict[str, int], with_environment: bool) -> None:
    total = sum({BENCHMARKS[name].dataset: size for name, size in found.items()}.values())
    say(f"{len(settings.rows)} rows: {', '.join(row.name for row in settings.rows)}")
    for name, size in found.items():
        left = f"{size / GIB:.1f} GiB to download" if size else "nothing to download"
        say(f"{BENCHMARKS[name].title}: up to {settings.questions} questions, {left}")
    lasts = hours(settings, question_s, settings.questions * len(found))
    disk = total * 2 / GIB + (ENVIRONMENT_GIB if with_environment else 0)
    say(
        f"at most about {lasts:.1f} hours of answering on this machine ({question_s:.1f} s per question without pruning), "
        f"{total / GIB:.1f} GiB to download, and {disk:.0f} GiB of disk space"
    )


def part(report: dict[str, Any], name: str, path: Path, work: Callable[[], Any]) -> None:
    """Run a part unless its results exist. A failure is recorded, so that the other parts run."""
    report["failed"].pop(name, None)
    try:
        if not path.exists():
            write(path, work())
        report["parts"][name] = json.loads(path.read_text(encoding="utf-8"))
    except Failed as problem:
        say(f"error: {problem}")
        report["failed"][name] = str(problem)
    page.write_report(path.parent, report)


def run(options: argparse.Namespace) -> int:
    settings = settings_of(options)
    folder = options.output
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be created: {error.strerror}", "choose another folder with -o") from None
    settings.check(folder)
    if options.python:
        check_python(options.python)
    clip = folder / "clip.mp4"
    if not clip.exists():
        page.write_clip(clip)
    describe(ModelOptions(settings.model, **settings.loading))  # raises an error if the model's small files are wrong
    found, unreachable = sizes(settings)
    if not found:
        raise Failed(f"{next(iter(unreachable.values()))}\nhint: check the network, or use --benchmarks clips")
    if options.plan or not (folder / "settings.json").exists():  # a continued run has printed it
        print_plan(settings, question_seconds(settings, clip), found, options.python is None)
    for problem in unreachable.values():
        say(f"left out: {problem}")
    if options.plan:
        return 0
    write(folder / "settings.json", settings.as_json())
    say(f"results are written to {folder}; the same command continues after Ctrl-C")
    report = page.new_report(settings)
    report["failed"] |= unreachable
    part(
        report,
        "verify",
        folder / "verify.json",
        lambda: evoprune("verify", *model_options(settings), "-o", str(folder / "verify-record.json")),
    )
    part(report, "speed", folder / "speed.json", lambda: speed(settings, clip))
    python = options.python or make_environment(folder.resolve() / "environment")
    local = [name for name in found if BENCHMARKS[name].dataset is None]
    if local and not (folder / "clips" / "questions.jsonl").exists():
        write_clips(folder / "clips", settings.questions, lambda count: say(f"clips: {count} questions"))
    for name in found:
        begun = time.monotonic()
        part(
            report,
            name,
            folder / f"{name}.json",
            lambda name=name: run_benchmark(name, python.absolute(), folder.resolve()),
        )
        if name in report["parts"]:
            say(f"{name}: done in {(time.monotonic() - begun) / 60:.0f} min")
    report["finished_utc"] = datetime.now(UTC).isoformat(timespec="seconds")
    page.write_report(folder, report)
    print((folder / "report.md").read_text(encoding="utf-8"))
    return 1 if report["failed"] else 0


def main(argv: Sequence[str] | None = None) -> int:
    options = parsed(argv)
    try:
        return run(options)
    except (EvopruneError, Failed) as problem:
        say(f"error: {problem}")
        return getattr(problem, "exit_code", 1)
    except KeyboardInterrupt:
        say(f"\nStopped. The same command continues the run in {options.output}.")
        return 130


if __name__ == "__main__":
    sys.exit(main())
