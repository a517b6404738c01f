"""Run transformers' own tests for all model families with pruning enabled. Also contains the pytest plugin that enables pruning.

    python -m experiments.environments.huggingface --source DIR

DIR is a checkout of transformers at the installed version. The tests for these models, including the common and generation tests,
run on images and videos. Each test runs three times: unpatched, with the `none` method, and with `evoprune` at budget 1.0. Tests
that fail unpatched are ignored. In all other tests, the patched models must pass, or evoprune must raise one of its own errors.

The towers in the tests have one patch per unit, which evoprune rejects. Therefore, the plugin gives them 2x2 identical patches per
unit, which does not change the prompts. The plugin can also convert the images in the common inputs to videos.
"""

import argparse
import copy
import functools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
import transformers

import evoprune
from evoprune.errors import EvopruneError
from evoprune.model import FAMILIES

ROOT = Path(__file__).parents[2]
TESTS = "tests/models/{0}/test_modeling_{0}.py"
UNPATCHED = "unpatched"
PATCHED = ("none", "evoprune")
MEDIA = ("pictures", "videos")
MERGE = 2

Outcomes = dict[str, dict]  # test -> the last record that the plugin created for it


def outcomes(source: Path, families: Sequence[str], method: str, media: str, options: Sequence[str]) -> Outcomes:
    """Run the tests in a separate process, and return their outcomes. Exits this script if a test file did not run."""
    tests = [TESTS.format(family) for family in families]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with TemporaryDirectory() as folder:
        file = Path(folder) / "outcomes.json"
        plugin = ["-p", "experiments.environments.huggingface", "--evoprune", method, "--evoprune-media", media]
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
    """Compare the outcomes of tests that passed without the patch.

    Returns:
        The number of times that evoprune raised each of its own errors, keyed by message, and the records of all other failures.
    """
    passed = [name for name, record in before.items() if record["outcome"] == "passed"]
    missing = {"outcome": "failed", "refused": False, "message": "did not run"}
    failed = [after.get(name, missing | {"test": name}) for name in passed]
    failed = [record for record in failed if record["outcome"] != "passed"]
    refused = Counter(record["message"] for record in failed if record["refused"])
    return refused, [record for record in failed if not record["refused"]]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.environments.huggingface", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--source", type=Path, required=True, help="a checkout of transformers")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), help="default: all")
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


# The plugin.

_records: list[dict] = []


def pytest_addoption(parser) -> None:
    parser.addoption("--evoprune", default="unpatched", help="the method that models prune with at budget 1.0")
    parser.addoption("--evoprune-media", choices=("pictures", "videos"), default="pictures")
    parser.addoption("--evoprune-outcomes", required=True, help="JSON file for the outcome of each test")


def pytest_collection_modifyitems(config, items) -> None:
    for cls in {item.cls for item in items if getattr(item, "cls", None) is not None}:
        _adapt_inputs(cls, config.getoption("--evoprune-media") == "videos")
    if (method := config.getoption("--evoprune")) != "unpatched":
        _prune_all_models(method)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    problem = call.excinfo.value if call.excinfo else None
    report.outcome_record = {  # stored in the report, because `-n` sends reports to the main process
        "test": item.nodeid,
        "outcome": report.outcome,
        "refused": isinstance(problem, EvopruneError),
        "message": f"{type(problem).__name__}: {problem}".splitlines()[0] if problem else None,
    }


def pytest_runtest_logreport(report) -> None:
    if (report.when == "call" or not report.passed) and hasattr(report, "outcome_record"):
        _records.append(report.outcome_record)


def pytest_sessionfinish(session) -> None:
    if hasattr(session.config, "workerinput"):
        return
    with open(session.config.getoption("--evoprune-outcomes"), "w", encoding="utf-8") as file:
        json.dump(_records, file)


def _adapt_inputs(cls, videos: bool) -> None:
    """Patch the test class `cls` to use common inputs with 2x2 patches per unit and, if `videos`, videos instead of images."""
    set_up = cls.setUp

    @functools.wraps(set_up)
    def adapted(self):
        set_up(self)
        tester = getattr(self, "model_tester", None)
        if not hasattr(tester, "prepare_config_and_inputs_for_common"):
            return
        make_config = tester.get_config
        make_inputs = tester.prepare_config_and_inputs_for_common
        rope = copy.deepcopy(getattr(tester, "rope_parameters", None))  # a copy, because the config may modify it
        config = make_config()
        if not hasattr(config, "vision_config"):  # a language model without a tower
            return
        before = config.vision_config.spatial_merge_size
        tester.get_config = functools.partial(_config, tester, make_config, rope)
        tester.prepare_config_and_inputs_for_common = lambda: with_patches(*make_inputs(), before, videos)
        if hasattr(self, "prepare_config_and_inputs_for_generate"):
            for_generate = self.prepare_config_and_inputs_for_generate

            def fewer(*args, **kwargs) -> tuple:
                """Return inputs with fewer prompts. Patches are added last, because the tests first slice their own tensors."""
                adapted_inputs = tester.prepare_config_and_inputs_for_common
                tester.prepare_config_and_inputs_for_common = make_inputs
                try:
                    return with_patches(*for_generate(*args, **kwargs), before, videos)
                finally:
                    tester.prepare_config_and_inputs_for_common = adapted_inputs

            self.prepare_config_and_inputs_for_generate = fewer

    cls.setUp = adapted


def _config(tester, make_config, rope: dict | None):
    """Return the tests' config. `rope` is copied, because text and tower share it and the tower's config modifies it."""
    if rope is not None:
        tester.rope_parameters = copy.deepcopy(rope)
    return _with_units(make_config())


def _with_units(config):
    """Configure 2x2 patches per unit, the activation and rotation of published models, and a valid full-attention layer."""
    vision = config.vision_config
    if getattr(vision, "rope_parameters", None):
        vision.rope_parameters["rope_theta"] = 10000.0
    vision.hidden_act = FAMILIES[config.model_type].hidden_act
    vision.spatial_merge_size = MERGE
    if hasattr(vision, "fullatt_block_indexes"):
        vision.fullatt_block_indexes = [vision.depth - 1]
    return config


def with_patches(config, inputs: dict, before: int, videos: bool) -> tuple:
    """Return the config and the inputs with 2x2 patches per unit.

    Args:
        before: The number of patches along a unit's side in the tests' own inputs.
        videos: Whether to convert images to videos, so that an image's rows become successive time steps.
    """
    config = _with_units(config)
    if "image_grid_thw" not in inputs:
        return config, inputs
    factor = MERGE // before
    pixels = inputs["pixel_values"].repeat_interleave(factor**2, 0)
    grids = inputs["image_grid_thw"].clone()
    grids[:, 1:] *= factor
    if not videos:
        return config, inputs | {"pixel_values": pixels, "image_grid_thw": grids}
    rows = grids[:, 1] // MERGE
    grids = torch.stack([grids[:, 0] * rows, torch.full_like(rows, MERGE), grids[:, 2]], 1)
    inputs = {name: value for name, value in inputs.items() if name not in ("pixel_values", "image_grid_thw")}
    ids = inputs["input_ids"]
    inputs["input_ids"] = ids.masked_fill(ids == config.image_token_id, config.video_token_id)
    if inputs.get("mm_token_type_ids") is not None:
        types = inputs["mm_token_type_ids"]
        inputs["mm_token_type_ids"] = types.masked_fill(types == 1, 2)
    return config, inputs | {"pixel_values_videos": pixels, "video_grid_thw": grids}


def _prune_all_models(method: str) -> None:
    """Make every model of a supported class prune, starting with its first call."""
    for cls in (getattr(transformers, f"{family.model}ForConditionalGeneration") for family in FAMILIES.values()):
        for name in ("forward", "generate"):
            setattr(cls, name, _from_now_on(getattr(cls, name), name, method))


def _from_now_on(stock, name: str, method: str):
    @functools.wraps(stock)
    def run(self, *args, **kwargs):
        if any(own in vars(self) for own in ("forward", "generate")):
            return stock(self, *args, **kwargs)
        evoprune.apply(self, budget=1.0, method=method)
        return getattr(self, name)(*args, **kwargs)

    return run


if __name__ == "__main__":
    sys.exit(main())
