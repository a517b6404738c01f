"""On CUDA, small inputs are pruned only after the tower. These tests make plans treat the CPU like a CUDA device."""

from collections import Counter
from dataclasses import replace
from math import prod

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

import evoprune
from evoprune import methods
from evoprune.backend import limits
from evoprune.methods.plans import TowerShape
from evoprune.session import Cache, ModelOptions, PruneOptions, describe, load_model
from evoprune.statistics import stats_block
from evoprune.video import SamplingOptions, probe
from evoprune.video_qa import VideoQA
from evoprune.vision import encode_rows, encoder
from tests.methods.kinds import NEED_FILES
from tests.tiny import tiny_model
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

LIMIT = limits.LAUNCH_BOUND_UNITS["cuda"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GRID = (5, 4, 6)
ALWAYS, AFTER = "evoprune:inner=always", "evoprune:depth=1:reuse=0"
CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture
def as_cuda(monkeypatch):
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", LIMIT)


def plan(name: str, grid: tuple[int, int, int], device: torch.device = CUDA, budget: float = 0.25):
    return PruneOptions(budget, name).config().plan(TowerShape.of(tiny_tower().config, str(device)), grid)


class Counting(TorchDispatchMode):
    """Counts the torch operations that run in its scope."""

    def __init__(self):
        super().__init__()
        self.operations = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operations[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


def counted(how, patches: torch.Tensor):
    """Encode according to the plan `how`, and return the encoding and its number of operations after a warm-up run."""
    encode_rows(tiny_tower(), [patches], how).select_tokens()
    with Counting() as counting:
        made = encode_rows(tiny_tower(), [patches], how).select_tokens()
    return made, counting.operations.total()


@pytest.mark.parametrize(("device", "units"), [("cpu", 0), ("cuda", LIMIT), ("cuda:1", LIMIT), ("xpu", 0), ("meta", 0)])
def test_launches_bound_the_tower_on_cuda_alone(device, units):
    assert (
        TowerShape.of(tiny_tower().config, device).launch_bound == limits.DeviceName(device).launch_bound_units == units
    )


def test_the_limit_lies_between_the_sizes_that_were_measured():
    assert 1536 < LIMIT < 4784  # the largest that lost by it, and the smallest that gained (results/gpu.md)


@pytest.mark.parametrize("budget", [0.1, 0.25, 0.5, "fast", "balanced"])
@pytest.mark.parametrize("grid", [GRID, (1, 4, 6), (1, 1, LIMIT - 1), (4, 16, 31)])
def test_a_small_input_is_pruned_after_the_tower_with_as_many_tokens(grid, budget):
    small, inside, after = (plan(name, grid, CUDA, budget) for name in ("evoprune", ALWAYS, AFTER))
    assert small.layers == (prod(grid),) * small.depth and small.rows == prod(grid) and not small.reuse
    assert small.keep == inside.keep and small.exact
    assert small == after and small.after_tower_below == LIMIT and not inside.after_tower_below
    assert inside == plan(ALWAYS, grid, CPU, budget) == plan("evoprune", grid, CPU, budget)
    assert len(inside.stages) > 1 and inside.layers < small.layers


@pytest.mark.parametrize("grid", [(1, 1, LIMIT), (1, 32, LIMIT // 32), (8, 20, 20)])
def test_from_the_limit_on_nothing_differs(grid):
    made = plan("evoprune", grid)
    assert made.after_tower_below == LIMIT  # records contain the rule, whatever its effect
    assert replace(made, after_tower_below=0) == plan("evoprune", grid, CPU) == plan(ALWAYS, grid)
    assert len(made.stages) == 3 and made.reuse


OTHERS = [name for name in methods.available(plugins=False) if name not in ("evoprune", *NEED_FILES)]


@pytest.mark.parametrize("name", [*OTHERS, "reuse+divprune", "ipcv+divprune"])
def test_other_methods_do_what_they_do_everywhere(name):
    assert plan(name, GRID) == plan(name, GRID, CPU)


@pytest.mark.parametrize("name", ["evoprune+fastv", "evoprune:within=0.2", "evoprune:first=0", "evoprune:depth=1"])
def test_what_is_combined_with_it_or_set_in_it_follows(name):
    made = plan(name, GRID)
    assert made.after_tower_below == LIMIT and [stage.first_layer for stage in made.stages] == [made.depth]
    assert made.stages[-1] == plan(name, GRID, CPU).stages[-1]


def test_nothing_is_left_out_where_nothing_is_pruned():
    assert plan("evoprune", GRID, budget=1.0) == plan("none", GRID, budget=1.0)


@pytest.mark.parametrize("value", ["never", "", "0"])
def test_a_wrong_setting_is_refused(value):
    with pytest.raises(evoprune.UsageError, match="inner must be one of auto, always"):
        methods.MethodChain.parse(f"evoprune:inner={value}")


def test_the_tower_computes_all_rows_without_an_operation_of_a_selection(monkeypatch):
    patches, selections = clip(GRID, changes(GRID, 0.3)), []
    select = encoder.select
    monkeypatch.setattr(encoder, "select", lambda *args: selections.append(len(args[1].rows)) or select(*args))
    full, operations_full = counted(plan("none", GRID, budget=1.0), patches)
    assert selections == []
    small, operations_small = counted(plan("evoprune", GRID), patches)
    assert {*selections} == {prod(GRID)} and len(selections) == 2  # of tokens, among all rows, once per encoding
    selections.clear()
    inside, operations_inside = counted(plan(ALWAYS, GRID), patches)
    assert len(selections) == 6
    assert small.layers == full.layers and all(
        fewer < rows for (_, fewer), (_, rows) in zip(inside.layers, small.layers, strict=True)
    )
    assert torch.equal(small.rows, full.rows)  # the tower's output equals the unpruned one to the last bit
    assert len(small.kept) == len(inside.kept) == small.features.shape[0] == round(0.25 * prod(GRID))
    _, operations_after = counted(plan(AFTER, GRID), patches)
    assert operations_full < operations_small == operations_after < operations_inside
    assert operations_small - operations_full < (operations_inside - operations_full) / 3


@pytest.mark.full
def test_above_the_limit_the_encoder_does_what_it_did():
    grid = (2, 32, 32)
    patches = clip(grid, changes(grid, 0.3))
    (made, operations), (always, expected), (_, here) = (
        counted(each, patches) for each in (plan("evoprune", grid), plan(ALWAYS, grid), plan("evoprune", grid, CPU))
    )
    assert operations == expected == here
    assert torch.equal(made.kept, always.kept) and torch.equal(made.features, always.features)


# Visible effects on a session, a held model, the cache, and records.


@pytest.fixture(scope="module")
def loaded():
    return load_model("demo", device="cpu")


def encoded(loaded, inputs=CLIP, **pruning):
    return VideoQA(loaded, budget=0.25, **pruning).encode(inputs, frames=8)


def test_a_record_says_it(loaded, as_cuda):
    small, inside, after = (encoded(loaded, method=name) for name in ("evoprune", ALWAYS, AFTER))
    assert torch.equal(small.encoded.kept, after.encoded.kept)
    assert torch.equal(small.encoded.features, after.encoded.features)
    for made, below, count in ((small, LIMIT, 1), (inside, None, None)):
        answer = made.ask(QUESTION, max_new_tokens=1)
        assert answer.text
        report = answer.report
        pruning = report.pruning
        assert (pruning.after_tower_below, pruning.after_tower_inputs) == (below, count)
        assert report.inputs[0].pruning == pruning
        lines = "\n".join(stats_block(report))
        assert ("only after the tower: under 2,048 visual tokens" in lines) == bool(count)
    said = small.report.pruning
    assert said.visual_tokens_kept == inside.report.pruning.visual_tokens_kept
    assert said.encoder_live_share == 1 > inside.report.pruning.encoder_live_share
    assert said.args["inner"] == "auto" and inside.report.pruning.args["inner"] == "always"


def test_on_a_cpu_records_say_nothing_of_it(loaded):
    pruning = encoded(loaded).report.pruning
    assert pruning.after_tower_below is pruning.after_tower_inputs is None and pruning.encoder_live_share < 1


def test_each_of_several_inputs_has_its_own_size(loaded, monkeypatch, tmp_path):
    picture = str(tmp_path / "picture.png")
    Image.fromarray(np.arange(112 * 112 * 3, dtype=np.uint32).astype(np.uint8).reshape(112, 112, 3)).save(picture)
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", 60)
    both = encoded(loaded, [CLIP, picture]).report
    small = [facts.pruning.visual_tokens_in < 60 for facts in both.inputs]
    assert sorted(small) == [False, True]
    assert [facts.pruning.after_tower_inputs for facts in both.inputs] == [int(each) for each in small]
    assert (both.pruning.after_tower_below, both.pruning.after_tower_inputs) == (60, 1)


def test_the_cache_tells_devices_and_limits_apart(loaded, monkeypatch, tmp_path):
    cache = Cache(tmp_path)
    found = []
    for limit in (0, LIMIT, LIMIT, 10):
        monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", limit)
        made = VideoQA(loaded, budget=0.25).encode(CLIP, frames=8, cache=cache)
        found.append((made.report.cache, made.report.pruning.after_tower_below, made.report.pruning.after_tower_inputs))
    assert found == [("miss", None, None), ("miss", LIMIT, 1), ("hit", LIMIT, 1), ("miss", 10, 0)]


def test_a_stream_follows_window_by_window(loaded, as_cuda):
    frames = [np.full((56, 84, 3), level, np.uint8) for level in (0, 60, 120, 120, 120, 200, 90, 10)]
    texts, shares = [], []
    for name in ("evoprune", AFTER):
        with VideoQA(loaded, budget=0.25, method=name).stream(window_s=2, fps=2) as stream:
            for number, frame in enumerate(frames):
                stream.add(frame, number / 2)
            answer = stream.ask(QUESTION, max_new_tokens=4)
            texts.append(answer.text)
            shares.append(answer.report.pruning.encoder_live_share)
    assert texts[0] == texts[1] and shares == [1, 1]


def test_a_held_model_follows(as_cuda):
    patches, grids = torch.randn(4 * 120, 1176, generator=torch.Generator().manual_seed(0)), torch.tensor([[5, 8, 12]])
    held = tiny_model()
    small, after = (evoprune.encode(held, patches, grids, budget=0.25, method=name) for name in ("evoprune", AFTER))
    assert torch.equal(small.kept, after.kept) and torch.equal(small.features, after.features)
    assert small.live_share == 1 and small.after_tower_below == LIMIT
    inside = evoprune.encode(held, patches, grids, budget=0.25, method="evoprune:inner=always")
    assert len(inside.kept) == len(small.kept) and inside.live_share < 1 and not inside.after_tower_below


def test_a_plan_before_loading_is_that_of_the_device_that_will_run_it():
    described = describe(ModelOptions("demo"))
    info, pruning = probe(CLIP), PruneOptions(budget=0.25)
    plans = [replace(described, device=name).plan(info, SamplingOptions(frames=8), pruning) for name in ("cpu", "cuda")]
    assert [made.encoder.after_tower_below for made in plans] == [0, LIMIT]
