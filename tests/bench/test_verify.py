"""All checks pass on small models, and each planted fault is found by its check."""

import json
import platform
import shutil
from itertools import product

import pytest
import torch

from evoprune.backend import Device
from evoprune.bench.shared import TimeLimit
from evoprune.bench.verify import checks
from evoprune.bench.verify.run import CHECKS, subject_of, verify
from evoprune.bench.verify.subject import DIFFERS, HELD, QUESTION, SKIPPED, Check, Outcome, computing_in, gap, judged
from evoprune.language import static
from evoprune.model import FAMILIES
from evoprune.session import load_model
from tests.backend.recorder import Graphs
from tests.bench.faults import FAULTS, QWEN3_FAULTS
from tests.language.graphs import forget_graphs
from tests.loading import edit
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny

CASES = [*product(("qwen2_5_vl", "qwen3_vl", "demo"), FAULTS), *product(("qwen3_vl",), QWEN3_FAULTS)]

COMPARED = [family for family in FAMILIES if family != "qwen4_exp"]  # its layers also read token ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    at = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny(at / family, family=family) for family in COMPARED}


def verified(name, *, path=None, limit=1e6, dtype="fp32", **how):
    loaded = load_model(str(name), device="cpu", dtype=dtype, pack=False)
    with subject_of(loaded, path) as subject:
        return [*verify(subject, TimeLimit(limit), **how)][-1]


def states(results) -> dict[str, str]:
    return {found.check.name: found.outcome.state for found in results.findings}


def assert_held(results) -> None:
    assert results.verdict == HELD
    assert not [(found.check.name, found.outcome.says) for found in results.of(DIFFERS)]


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["demo", *COMPARED])
def test_everything_holds(folders, name):
    assert_held(results := verified(folders.get(name, name), quick=True))
    assert {n for n, s in states(results).items() if s == SKIPPED} == {"plain", "speed"}


@pytest.fixture
def graphs(monkeypatch):
    """Treat the CPU as a GPU whose graphs are recorded."""
    made = Graphs()
    monkeypatch.setattr(Device, "uses_kernels", True)
    monkeypatch.setattr(Device, "capture", property(lambda self: made.capture))
    forget_graphs(monkeypatch)
    monkeypatch.setattr("evoprune.backend.hosted.is_host", lambda device: False)
    return made


def plain(folder) -> Outcome:
    with subject_of(load_model(str(folder), device="cpu", dtype="fp32", pack=False), None) as subject:
        return checks.accelerated(subject)


@pytest.mark.full
@pytest.mark.parametrize("family", ["qwen3_5_moe", "qwen3_vl_moe", "qwen2_5_vl"])
def test_graphs_decode_what_is_decoded_plainly(folders, family, graphs):
    outcome = plain(folders[family])
    assert outcome.state == HELD and "; decoding " in outcome.says
    assert graphs.captured and "decoding_mean_error" in outcome.figures


def test_a_model_that_has_no_graph_differs_in_nothing(folders, graphs, monkeypatch):
    monkeypatch.setattr(static, "can_step", lambda model: False)
    outcome = plain(folders["qwen3_5_moe"])
    assert outcome.state == SKIPPED and outcome.says.startswith("no graph: layers have hooks, quantized weights")
    assert not graphs.captured and "tower_mean_error" in outcome.figures


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::evoprune.errors.DeviceWarning")  # the answer's tokens are decoded without a graph
def test_a_capture_that_fails_differs_in_nothing(folders, graphs, monkeypatch):
    def fails(function):
        raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture\nand more")

    monkeypatch.setattr(graphs, "capture", fails)
    outcome = plain(folders["qwen3_5_moe"])
    assert outcome.state == SKIPPED
    assert outcome.says.startswith(
        "no graph: Cannot copy between CPU and CUDA tensors during CUDA graph capture; tower "
    )


@pytest.mark.full
@pytest.mark.parametrize(
    "name, dtype", [("demo-scenes", "fp32"), *product(["demo", *COMPARED], ["fp32", "bf16", "fp16"])]
)
def test_all_of_it_holds_in_every_dtype(folders, name, dtype):
    results = verified(folders.get(name, name), dtype=dtype)
    assert_held(results)
    (speed,) = (found for found in results.findings if found.check.name == "speed")
    assert speed.outcome.figures["ratio"] > 0
    slow = [found for found in results.findings if found.check.slow]
    assert not [found for found in slow if found.outcome.says == "--quick"]


@pytest.mark.few(3)
@pytest.mark.parametrize("name, fault", CASES)
def test_a_fault_is_found_by_the_check_that_should_find_it(folders, name, fault, monkeypatch):
    planted = (FAULTS | QWEN3_FAULTS)[fault]
    (check,) = [check for check in CHECKS if check.name == planted.found_by]
    planted.plant(monkeypatch)
    (found,) = verified(folders.get(name, name), checks=[check]).findings
    assert not found.outcome.says.startswith("raised"), found.outcome
    assert found.outcome.state == DIFFERS, found.outcome


def test_every_check_finds_a_fault():
    measured = {"speed", "plain"}  # "speed" compares nothing that could differ; for faults of "plain" see test_cuda.py
    assert {fault.found_by for fault in FAULTS.values()} == {check.name for check in CHECKS} - measured


def test_a_separate_output_layer_under_tied_embeddings_that_is_left_out_is_found(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders["qwen2_5_vl"], tmp_path / "apart")
    edit(folder / "config.json", tie_word_embeddings=True)
    assert_held(verified(folder, checks=CHECKS[:4]))
    monkeypatch.setattr("evoprune.session.loading.weights.separate_head", lambda files: False)
    found = verified(folder, checks=CHECKS[:4])
    assert states(found)["weights"] == states(found)["logits"] == DIFFERS
    (weights,) = (each.outcome for each in found.findings if each.check.name == "weights")
    assert weights.says == "1 tensor not equal to the files as transformers reads them, first lm_head.weight"


def test_without_memory_for_a_second_copy_it_is_made_of_our_tensors(monkeypatch):
    loaded = load_model("demo", device="cpu", dtype="fp32", pack=False)
    monkeypatch.setattr(Device, "shortage", lambda _, needed: "needs more" if needed == loaded.weights_bytes else None)
    with subject_of(loaded, None) as subject:
        results = [*verify(subject, TimeLimit(1e6), checks=CHECKS[:4])][-1]
    assert {n for n, s in states(results).items() if s == SKIPPED} == {"weights"}


@pytest.mark.full
def test_what_an_older_transformers_cannot_do_is_skipped(monkeypatch):
    monkeypatch.setattr("evoprune.bench.verify.checks.takes_encoded", lambda model: False)
    positions = [check for check in CHECKS if check.name == "positions"]
    assert states(verified("demo", path="samples/square.mp4", checks=positions)) == {"positions": SKIPPED}  # 2 / 3 s
    assert states(verified("demo", checks=positions)) == {"positions": HELD}


def test_what_begins_after_the_time_limit_is_skipped():
    results = verified("demo", limit=0)
    assert results.verdict == SKIPPED and {*states(results).values()} == {SKIPPED}
    assert "time limit of 0 s" in results.findings[0].outcome.says


def test_a_check_that_raises_differs_and_names_no_path(tmp_path):
    def fails(subject):
        raise RuntimeError(f"no kernel in {tmp_path}/lib.so\nand more")

    def starves(subject):
        raise torch.OutOfMemoryError("CUDA out of memory")

    raised = []
    checks = (Check("kernel", "", fails), Check("memory", "", starves), Check("good", "", lambda _: judged("fine", {})))
    results = verified("demo", checks=checks, quick=True, failed=raised.append)
    assert states(results) == {"kernel": DIFFERS, "memory": SKIPPED, "good": HELD}
    assert results.findings[0].outcome.says == "raised RuntimeError: no kernel in PATH" and len(raised) == 1


@pytest.mark.full
def test_the_record_has_no_paths_prompts_or_names_of_machines(folders):
    results = verified(folders["qwen2_5_vl"], quick=True)
    text = json.dumps(results.document(), allow_nan=False)
    for secret in (str(folders["qwen2_5_vl"].parent), QUESTION, platform.node()):
        assert secret not in text
    assert json.loads(text)["model"]["id"] is None
    assert verified("demo", checks=CHECKS[:1]).document()["model"]["id"] == "demo"


def test_a_wider_dtype_shows_rounding_and_leaves_the_model_as_it_was(folders, monkeypatch):
    loaded = load_model(str(folders["qwen2_5_vl"]), device="cpu", dtype="bf16", pack=False)
    exact = load_model(str(folders["qwen2_5_vl"]), device="cpu", dtype="bf16", pack=False)
    exact.model.float()
    monkeypatch.setattr(Device, "shortage", lambda *_: "so that our tensors are used")
    with subject_of(loaded, None) as subject, subject_of(exact, None) as other:
        before = subject.features(subject.about(subject.video).call)[0]
        with computing_in(subject.transformers, torch.float32):
            wide = subject.features(subject.about(subject.video).call)[0]
        call = other.about(other.video).call
        rounded = {name: value.bfloat16().float() for name, value in call.items() if "pixel" in name}
        expected = other.features(call | rounded)[0]
        assert wide.dtype == torch.float32 and gap(wide, expected).largest < 1e-5 < 1e-3 < gap(before, expected).mean
        assert torch.equal(subject.features(subject.about(subject.video).call)[0], before)


def test_a_figure_that_is_no_number_differs():
    outcome = judged("", {"error": (float("nan"), 1.0)})
    assert outcome.state == DIFFERS and outcome.figures == {"error": None, "error_limit": 1.0}
    assert gap(torch.zeros(2, 3), torch.ones(3, 3)).mean == float("inf")


@pytest.mark.full
@pytest.mark.parametrize("path", ["samples/square.mp4", "docs/overlay.png"])
def test_a_file_of_the_user(path):
    assert_held(verified("demo", path=path, quick=True))
