"""Test that a second device produces the CPU's results and, like a GPU, raises an error if an operation mixes devices."""

from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import evoprune
from evoprune.backend import Device, attention, limits
from evoprune.batch import RowReader, Settings, Span, answers
from evoprune.bench import TuneSettings, Tuning
from evoprune.bench.shared import TimeLimit
from evoprune.bench.verify.run import subject_of, verify
from evoprune.bench.verify.subject import DIFFERS, Subject
from evoprune.errors import OutOfMemory
from evoprune.hf import processor_inputs
from evoprune.language import static
from evoprune.methods import available
from evoprune.model import FAMILIES
from evoprune.session import ModelOptions, load_model
from evoprune.video import InputLimits, SamplingOptions
from evoprune.vision import patches_of
from evoprune.vision.preprocess import MAX_SHRINK
from tests.backend.recorder import Graphs, Recorder
from tests.live.inside import cache_of
from tests.loading import described
from tests.recipes import write_recipe
from tests.second_device import far
from tests.second_device.far import NAME, Far, Memory
from tests.session.inside import encodings_of
from tests.session.test_language_methods import DEMO
from tests.tiny import save_tiny
from tests.vision.devices import varlen_by_hand
from tests.waiting import Waiting

pytestmark = pytest.mark.device

CLIP, OTHER, PICTURE = "samples/square.mp4", "samples/arrivals.webm", "docs/overlay.png"
QUESTION = "What colour is the square?"
COMBINED = ("reuse+divprune", "ipcv+divprune", "evoprune+fastv")
METHODS = [name for name in available(plugins=False) if name != "operations"]
FRAMES = {"frames": 8}


@cache
def loaded(device: str, model: str = "demo"):
    return load_model(model, device=device, dtype="fp32")


def both(inputs, model="demo", frames=FRAMES, budget=0.25, **pruning):
    """Encode the same inputs on the CPU and on the device."""
    qas = [evoprune.VideoQA(loaded(device, model), budget=budget, **pruning) for device in ("cpu", NAME)]
    return [qa.encode(inputs, **frames) for qa in qas]


def assert_same(cpu, device, near=2e-4) -> None:
    """Check that encodings, logits and answers match. `near`: feature tolerance; resizing may change values by one level."""
    for ours, theirs in zip(encodings_of(device), encodings_of(cpu), strict=True):
        assert ours.features.device.type == NAME and ours.layers == theirs.layers
        assert ours.kept.tolist() == theirs.kept.tolist()
        torch.testing.assert_close(ours.features.cpu(), theirs.features, atol=near, rtol=1e-4)
    made, expected = (each.read_along(QUESTION, [5, 6])[0].cpu() for each in (device, cpu))
    torch.testing.assert_close(made, expected, atol=max(2e-3, near / 5), rtol=1e-3)
    assert device.ask(QUESTION).text == cpu.ask(QUESTION).text


@pytest.mark.parametrize("method", [*METHODS, *COMBINED])
def test_every_method(method):
    assert_same(*both(CLIP, method=method), near=0.05 if method == "downscale" else 2e-4)


def test_a_small_input_where_launches_bound_the_tower(monkeypatch):
    """Pruning only after the tower gives the CPU's tokens with fewer operations and one wait less."""
    from tests.second_device.counting import encodes  # registers the device

    after = evoprune.VideoQA(loaded("cpu"), budget=0.25, method="evoprune:depth=1:reuse=0").encode(CLIP, **FRAMES)
    units = limits.LAUNCH_BOUND_UNITS["cuda"]
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, NAME, units)
    there = evoprune.VideoQA(loaded(NAME), budget=0.25).encode(CLIP, **FRAMES)
    assert_same(after, there)
    said = there.report.pruning
    assert (said.after_tower_below, said.after_tower_inputs) == (units, 1)
    assert_same(*both(CLIP, method="evoprune:inner=always"))
    counts = {}
    for name in ("none", "evoprune", "evoprune:inner=always"):
        qa = evoprune.VideoQA(loaded(NAME), budget=1.0 if name == "none" else 0.25, method=name)
        counted, waits = encodes(qa, CLIP, **FRAMES)
        counts[name] = counted.operations.total(), waits
    full, small, inside = counts.values()
    assert full[0] < small[0] < 1.06 * full[0] < inside[0]
    assert (full[1], small[1], inside[1]) == (1, 1, 2)


def test_operations(tmp_path):
    assert_same(*both(CLIP, method=write_recipe(tmp_path, DEMO)))


@pytest.mark.parametrize(
    "method", ["none", "evoprune", "evoprune-paper", "visionzip", "reuse+divprune", "evoprune+fastv"]
)
def test_the_varlen_kernel(method, monkeypatch):
    monkeypatch.setattr(
        attention.Attention,
        "varlen_kernel",
        property(lambda self: varlen_by_hand if self._device.type == NAME else None),
    )
    assert_same(*both(CLIP, method=method))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_every_family(family, budget, tmp_path):
    model = str(save_tiny(tmp_path / family, family=family))
    near = 2e-4 if family in ("qwen2_vl", "qwen2_5_vl") else 1e-3  # others resize
    assert_same(*both(CLIP, model, budget=budget), near=near)


@pytest.mark.parametrize("inputs", [PICTURE, [CLIP, OTHER], [PICTURE, CLIP]], ids=["picture", "two", "both"])
@pytest.mark.parametrize("budget", [1.0, 0.25])
def test_pictures_and_several_inputs(inputs, budget):
    assert_same(*both(inputs, budget=budget, frames=FRAMES | {"max_visual_tokens": 200}))


class CopiesThere(TorchDispatchMode):
    """Records the shape of each tensor copied from the CPU to the device."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Far) and args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu":
            self.shapes.append((*args[0].shape,))
        return made


@pytest.mark.parametrize(
    ("shape", "height", "width"),
    [((4, 120, 160, 3), 84, 112), ((2, 200, 90, 3), 56, 28), ((2, 40, 42, 3), 56, 84), ((2, 56, 84, 3), 56, 84)],
)
def test_frames_are_copied_once_and_resized_there(shape, height, width, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    plan, limits = SimpleNamespace(height=height, width=width), InputLimits()
    here = patches_of(frames, plan, limits, torch.device("cpu"))
    with CopiesThere() as copies:
        there = patches_of(frames, plan, limits, torch.device(NAME, 0))
    assert copies.shapes == [shape] and there.device.type == NAME and there.dtype == torch.uint8
    levels = (there.cpu().int() - here.int()).abs()
    assert levels.max() <= 1 and (levels > 0).float().mean() < 0.02
    monkeypatch.setattr("evoprune.vision.preprocess.FLOATS", 1)  # frame by frame
    assert torch.equal(patches_of(frames, plan, limits, there.device).cpu(), there.cpu())


def test_frames_that_shrink_by_far_are_resized_before_they_are_copied():
    frames, plan = np.zeros((2, 64, 28 * (MAX_SHRINK + 1), 3), np.uint8), SimpleNamespace(height=56, width=28)
    with CopiesThere() as copies:
        patches_of(frames, plan, InputLimits(), torch.device(NAME, 0))
    assert copies.shapes == [(2, 56, 28, 3)]


@pytest.mark.parametrize("budget", ["auto", "auto:inflection"])
def test_the_content_decides(budget):
    assert_same(*both(CLIP, budget=budget, method="evoprune" if budget == "auto" else "visionzip"))


@pytest.mark.filterwarnings("error::evoprune.errors.DeviceWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_graphs(family, tmp_path, monkeypatch):
    """Graphs are recorded without copies between the CPU and the device."""
    cpu, device = both(CLIP, str(save_tiny(tmp_path, family=family)))
    graphs, how = Graphs(), {"temperature": 1.0, "max_new_tokens": 12, "seed": 2}
    expected = cpu.ask(QUESTION, **how)
    expected.text  # generates the answer # noqa: B018
    monkeypatch.setattr(Device, "capture", property(lambda self: graphs.capture))
    # Tensors of this device are a subclass, like quantized ones.
    monkeypatch.setattr(static, "can_step", lambda model: family != "qwen4_exp")
    made = device.ask(QUESTION, **how)
    assert made.text == expected.text
    steps = 0 if family == "qwen4_exp" else len(expected.ids) - static.PLAIN_TOKENS
    assert graphs.captured + graphs.replayed == steps and graphs.captured == (steps > 0)


def test_sampling_draws_the_same_tokens():
    cpu, device = (each.ask(QUESTION, temperature=1.5, max_new_tokens=8, seed=3) for each in both(CLIP))
    assert device.text == cpu.text


def test_a_second_question_uses_the_prompt_again():
    cpu, device = both(CLIP)
    for question in (QUESTION, "Which digit is shown?", QUESTION):
        assert device.ask(question).text == cpu.ask(question).text


@pytest.mark.parametrize("demo_range", [True, False], ids=["moved", "thinned"])
def test_a_stream(demo_range):
    """Windows are thinned, and keys are rotated back if the range of positions is short."""
    made = []
    for device in ("cpu", NAME):
        model = loaded(device) if demo_range else described(loaded(device), folder=None)
        with evoprune.VideoQA(model, budget=0.25).stream(window_s=2.0, memory_s=8.0) as stream:
            for number in range(64):
                frame = np.random.default_rng(number).integers(0, 256, (112, 112, 3), dtype=np.uint8)
                stream.add(frame, number / 2)
            made.append((stream.ask(QUESTION).text, stream.seen, cache_of(stream)))
    (cpu, seen, expected), (device, also, cache) = made
    assert device == cpu and also == seen and seen.thinned
    for layer in range(len(cache.lengths)):
        for ours, theirs in zip(cache.room(layer, 0)[2:], expected.room(layer, 0)[2:], strict=True):
            assert ours.device.type == NAME
            torch.testing.assert_close(ours.cpu(), theirs, atol=2e-3, rtol=1e-3)


def test_the_cache(tmp_path):
    qa, cache = evoprune.VideoQA(loaded(NAME)), evoprune.Cache(tmp_path)
    first, again = (qa.encode(CLIP, cache=cache, **FRAMES) for _ in range(2))
    assert (first.report.cache, again.report.cache) == ("miss", "hit")
    assert again.encoded.features.device.type == NAME
    assert again.encoded.features.tolist() == first.encoded.features.tolist()
    assert again.ask(QUESTION).text == first.ask(QUESTION).text


@pytest.mark.parametrize("how", [{"budget": 1.0}, {"budget": 0.25}, {"budget": 0.25, "positions": "qwen"}], ids=str)
def test_transformers_model(how):
    calls = processor_inputs("demo", CLIP, QUESTION, **FRAMES)
    made = []
    for device in ("cpu", NAME):
        model = Subject(load_model("demo", device=device, dtype="fp32", pack=False), *2 * [CLIP]).transformers
        with evoprune.EvoPrune(**how)(model), torch.inference_mode():
            call = {name: value.to(device) for name, value in calls.items()}
            made.append(model(**call, use_cache=False).logits[0, -1].cpu())
    torch.testing.assert_close(*made, atol=2e-3, rtol=1e-3)


def test_tune():
    tuning = Tuning(
        TuneSettings(
            videos=(CLIP,), questions=(QUESTION,), budgets=(0.5,), model=ModelOptions("demo", device=NAME),
            sampling=SamplingOptions(frames=4), agree=0.05, time_limit_s=300,
        )
    )  # fmt: skip
    tuning.load(lambda *_: None)
    tuning.run(lambda *_: None, lambda *_: None)
    assert tuning.document(None)["rows"]


def test_verify():
    with subject_of(loaded(NAME), None) as subject:
        results = [*verify(subject, TimeLimit(1e6), quick=True)][-1]
    assert not [(found.check.name, found.outcome.says) for found in results.of(DIFFERS)]


def test_batch():
    rows = RowReader().pairs([CLIP, PICTURE], [QUESTION, "Which digit is shown?"])
    settings = Settings.of(frames=8, max_visual_tokens=200, max_new_tokens=8)
    cpu, device = (
        [(report.answer, report.error) for report in answers(qa.session, Span.group(rows), settings)]
        for qa in (evoprune.VideoQA(loaded(device)) for device in ("cpu", NAME))
    )
    assert device == cpu and len(device) == 4 and not any(error for _, error in device)


def test_less_is_encoded_at_a_time_where_memory_runs_out(monkeypatch):
    qa = evoprune.VideoQA(loaded(NAME), budget=1.0, method="none")
    monkeypatch.setattr(Memory, "largest", 0)
    expected = qa.encode(CLIP, **FRAMES).encoded.features.cpu()
    monkeypatch.setattr(Memory, "most", most := Memory.largest - 1)
    monkeypatch.setattr(Memory, "largest", 0)
    made = qa.encode(CLIP, **FRAMES).encoded.features.cpu()
    assert Memory.largest > most  # the allocation that was refused
    torch.testing.assert_close(made, expected, atol=2e-4, rtol=1e-4)
    monkeypatch.setattr(Memory, "most", 1000)
    qa.loaded.patches.clear()  # patches are read and cut again
    with pytest.raises(OutOfMemory, match=r"^out of memory in preprocess: .* GiB requested, .* GiB free\n") as raised:
        qa.encode(CLIP, **FRAMES)
    assert raised.value.exit_code == 5 and "--frames" in raised.value.hint


@pytest.mark.parametrize(
    ("method", "times", "selecting"), [("none", 2, 0), ("divprune", 2, 0), ("visionzip", 2, 7), ("evoprune", 3, 0)]
)
def test_how_often_it_waits(method, times, selecting):
    """From the first patches to the first token, as stated in docs/gpu.md; `-s` prints all places."""
    qa = evoprune.VideoQA(loaded(NAME), budget=1.0 if method == "none" else 0.25, method=method)
    made = []
    for tokens in (1, 1, 3):  # the first run fills caches
        with Waiting() as mode:
            answer = qa.encode(CLIP, **FRAMES).ask(QUESTION, max_new_tokens=tokens)
            answer.text  # generates the answer # noqa: B018
        made.append((mode, len(answer.ids) + (answer.report.finish_reason == "stop")))
    (first, one), (longer, more) = made[1:]
    print(f"{method}: {len(first.places)}", *first.places, sep="\n")
    assert (len(first.outside), len(first.places), one) == (times, times + selecting, 1)
    assert len(longer.places) - len(first.places) == more - 1 > 0


def test_layers_of_linear_attention_wait_for_nothing(tmp_path):
    """The language model is a module of transformers, except for its linear-attention layers."""
    qa = evoprune.VideoQA(loaded(NAME, str(save_tiny(tmp_path, family="qwen3_5"))), budget=0.25)
    for _ in range(2):
        with Waiting() as mode:
            qa.encode(CLIP, **FRAMES).ask(QUESTION, max_new_tokens=1).text  # noqa: B018
    assert len(mode.places) == 3, mode.places


@pytest.mark.parametrize("budget", [0.25, 1.0])
def test_operations_copies_and_waits_do_not_grow_with_the_video(budget):
    """From 384 units in two tubes to 1,152 in more. `python -m tests.second_device.counting` prints the table of results/gpu.md."""
    from tests.second_device.counting import encodes  # registers the device

    qa, made = evoprune.VideoQA(loaded(NAME), budget=budget), []
    for frames in (8, 24):
        counted, waits = encodes(qa, "samples/pan.mp4", frames=frames)
        made.append((counted.operations.total(), counted.copies, waits))
    assert made[0] == made[1] and made[0][1:] == ((2, 2) if budget < 1 else (1, 1))


# The device itself: its results, and the operations it refuses.


def test_it_computes_and_its_values_come_back():
    x = torch.arange(6, dtype=torch.float32, device=far.NAME).view(2, 3)
    y = torch.ones(3, 4).to(far.NAME)
    assert x.device.type == far.NAME and isinstance(x @ y, far.Far)
    assert (x @ y).tolist() == (x.cpu() @ y.cpu()).tolist() and int(x.argmax()) == 5
    x[0] += 1
    assert x.cpu().tolist() == [[1, 2, 3], [3, 4, 5]]
    torch.mul(x, 2, out=(out := torch.empty_like(x)))
    assert out.tolist() == [[2, 4, 6], [6, 8, 10]] and x.new_zeros(2).device == x.device
    assert torch.accelerator.current_accelerator().type == far.NAME


def test_it_refuses_tensors_of_the_cpu():
    x, here = torch.zeros(2, 3, device=far.NAME), torch.zeros(2, 3)
    for mixed in (lambda: x + here, lambda: x @ here.T, lambda: x[torch.tensor([0])], lambda: torch.cat([x, here])):
        with pytest.raises(far.ElsewhereError):
            mixed()
    assert (x + torch.tensor(1.0)).sum().item() == 6  # scalars do not count as CPU tensors
    x.copy_(torch.ones(2, 3))
    assert x.sum().item() == 6


def test_a_recorded_graph_refuses_copies():
    x, here, ends = torch.zeros(2, 3, device=far.NAME), torch.zeros(2, 3).pin_memory(), torch.tensor([1, 2]).int()
    copies = {
        "to the CPU": lambda: x.cpu(),
        "to the CPU, in another dtype": lambda: x.to("cpu", torch.float64),
        "from the CPU": lambda: here.to(far.NAME, non_blocking=True),
        "from the CPU, in another dtype": lambda: here.to(x.device, torch.float64),
        "from the CPU, into a tensor": lambda: x.copy_(here),
        "into a tensor of the CPU": lambda: here.copy_(x),
        "of numbers": lambda: torch.tensor([1.0], device=far.NAME),
        "of a value": lambda: x.sum().item(),
        "of the ends of groups": lambda: torch._grouped_mm(here, torch.zeros(2, 3, 4), offs=ends),
    }
    for what, copy in copies.items():
        with Recorder(), pytest.raises(AssertionError, match="while a graph is captured"):
            copy()
            pytest.fail(what)
    with Recorder():
        x.to(torch.float64).to(torch.float32)
