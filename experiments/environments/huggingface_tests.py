"""Run transformers' own tests of all families on models that prune.

    python -m experiments.environments.huggingface_tests --source DIR

DIR is a checkout of transformers of the installed version. The tests of these models, with the common and the generation tests,
run on pictures and on videos (`huggingface_plugin`), each three times: unpatched, with the method `none`, and with
`evoprune` at budget 1.0. A test that fails unpatched is left out. Every other test must pass, or be refused by evoprune with an
error of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from evoprune.model.config import MODEL_TYPES

ROOT = Path(__file__).parents[2]
TESTS = "tests/models/{0}/test_modeling_{0}.py"
UNPATCHED = "unpatched"
PATCHED = ("none", "evoprune")
MEDIA = ("pictures", "videos")

Outcomes = dict[str, dict]  # of each test that ran: its last record of the plugin


def outcomes(source: Path, families: Sequence[str], method: str, media: str, options: Sequence[str]) -> Outcomes:
    """Runs the tests in a process of their own."""
    tests = [TESTS.format(family) for family in families]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        plugin = ["-p", "experiments.environments.huggingface_plugin", "--evoprune", method, "--evoprune-media", media]
        command = [sys.executable, "-m", "pytest", "-q", *plugin, "--evoprune-outcomes", str(file), *tests, *options]
        env = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
        log = subprocess.run(command, cwd=source, env=env, capture_output=True, text=True)  # noqa: S603
        records = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        missing = [file for file in tests if not any(record["test"].startswith(file) for record in records)]
        if missing:
            problem = f"the tests of {' and '.join(missing)} did not run"
            raise SystemExit(f"{problem}:\n{log.stdout[-3000:]}{log.stderr[-3000:]}")
    found: Outcomes = {}
    for record in records:
        if found.get(record["test"], {}).get("outcome") != "failed":
            found[record["test"]] = record
    return found


def compare(before: Outcomes, after: Outcomes) -> tuple[Counter, list[dict]]:
    """Of the tests that pass in `before`: how many evoprune refuses in `after`, by message; and the records of other failures."""
    passed = [name for name, record in before.items() if record["outcome"] == "passed"]
    missing = {"outcome": "failed", "refused": False, "message": "did not run"}
    failed = [after.get(name, missing | {"test": name}) for name in passed]
    failed = [record for record in failed if record["outcome"] != "passed"]
    refused = Counter(record["message"] for record in failed if record["refused"])
    return refused, [record for record in failed if not record["refused"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.environments.huggingface_tests", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--source", type=Path, required=True, help="a checkout of transformers")
    parser.add_argument("--families", nargs="+", choices=MODEL_TYPES, default=MODEL_TYPES, help="default: all")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args(argv)
    status = 0
    for media in MEDIA:
        before = outcomes(options.source, options.families, UNPATCHED, media, options.pytest)
        count = Counter(record["outcome"] for record in before.values())
        print(f"\n{media}, unpatched: {count['passed']} pass, {count['failed']} fail, {count['skipped']} are skipped")
        for name in sorted(name for name, record in before.items() if record["outcome"] == "failed"):
            print(f"  left out: {name}: {before[name]['message']}")
        for method in PATCHED:
            refused, failed = compare(before, outcomes(options.source, options.families, method, media, options.pytest))
            passing = count["passed"] - refused.total() - len(failed)
            print(
                f"{media}, {method}: {passing} of {count['passed']} pass, {refused.total()} are refused, {len(failed)} fail"
            )
            for message, times in refused.most_common():
                print(f"  refused {times} times: {message}")
            for record in failed:
                print(f"  FAILED {record['test']}: {record['message']}")
            status = status or bool(failed)
    return int(status)


if __name__ == "__main__":
    sys.exit(main())
