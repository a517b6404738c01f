"""The measurement: rows and their order, counts, and when it stops. For figures see test_results.py."""

import json
from dataclasses import replace
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from evoprune.backend import Device
from evoprune.bench import clips, profile
from evoprune.bench.hugging_face import hugging_face_model
from evoprune.bench.profile import measure, run_evoprune, run_hugging_face
from evoprune.bench.profile_results import ProfileResults, Spread, median_ratio
from evoprune.bench.profile_rows import (
    BOUND,
    FULL,
    HUGGING_FACE,
    METHOD,
    Case,
    Counts,
    ProfileRow,
    ProfileSettings,
    Sample,
    bound_of,
)
from evoprune.bench.shared import TimeLimit, paced
from evoprune.errors import OutOfMemory
from evoprune.methods import EncoderPlan, TowerShape
from evoprune.model import matmul_rate
from evoprune.report import Environment, ModelFacts
from evoprune.session import ModelOptions, PruneOptions, describe
from evoprune.video import probe
from tests.quantized import KINDS
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny

CASE, OTHER = Case(4, 112, 168), Case(8, 84, 84)
SETTINGS = ProfileSettings(budgets=(0.5, 0.1), methods=("evoprune-paper", "random"), repetitions=2)
MOTION = partial(clips.synthetic_frames, "motion")


def unpruned(loaded, clip):
    return EncoderPlan.full(TowerShape.of_tower(loaded.model.model.visual), clip.grid)


@pytest.fixture(autouse=True)
def quick_rate(monkeypatch):
    """Skip measuring how fast this machine multiplies."""
    monkeypatch.setattr(profile, "matmul_rate", lambda *_, **__: 1e11)


@pytest.fixture(scope="module")
def loaded(saved):
    return profile.load(describe(ModelOptions(str(saved), dtype="fp32")), [CASE])


def last(*args, **settings):
    *_, results = measure(*args, **settings)
    return results


@pytest.fixture(scope="module")
def results(loaded):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profile, "matmul_rate", lambda *_, **__: 1e11)
        return last(loaded, [CASE, OTHER], MOTION, SETTINGS)


def test_every_row_is_there(results):
    expected = [
        (HUGGING_FACE, "Hugging Face", 1.0),
        (FULL, "budget 1.0", 1.0),
        (BOUND, "bound -b 0.5", 0.5),
        (METHOD, "evoprune-paper -b 0.5", 0.5),
        (METHOD, "random -b 0.5", 0.5),
        (BOUND, "bound -b 0.1", 0.1),
        (METHOD, "evoprune-paper -b 0.1", 0.1),
        (METHOD, "random -b 0.1", 0.1),
    ]
    assert results.cases == [CASE, OTHER]
    for case in results.cases:
        rows = results.of(case)
        assert [(row.kind, row.name, row.budget) for row in rows] == expected
        assert all(len(row.samples) == 2 and row.error is None for row in rows)
    assert (results.warmups, results.rounds, len(results.matmul_rates)) == (1, 2, 2)


def test_counts(results):
    """Four frames of 112x168 are two grids of 4x6 units. The tower's two layers attend to windows, then to grids."""
    hugging_face, full, bound, paper, random, *_, few = results.of(CASE)
    for row in (hugging_face, full):
        counts = row.counts
        assert (counts.units, counts.encoder_rows, counts.tokens, counts.prompt) == (48, 48, 48, 78)
        assert counts.live_share == 1 and counts.layers == ((0, 48), (1, 48))
    assert hugging_face.counts.tower_flop == full.counts.tower_flop
    assert (paper.counts.encoder_rows, paper.counts.tokens, paper.counts.prompt) == (24, 24, 54)
    assert paper.counts.layers == ((0, 48), (1, 24)) and paper.counts.live_share == 0.75
    assert paper.counts.tower_flop < full.counts.tower_flop
    assert (random.counts.encoder_rows, random.counts.tokens, random.counts.live_share) == (48, 24, 1)
    assert (bound.counts.encoder_rows, bound.counts.tokens, bound.counts.prompt) == (48, 24, 54)
    assert few.counts.tokens == 5
    for row in results.of(CASE):
        for sample in row.samples:
            assert min(sample.encode, sample.prefill, sample.generate) > 0
            assert (0 < sample.prune < sample.encode) or row.kind in (HUGGING_FACE, BOUND)


def test_what_prunes_nothing_is_there_once(loaded):
    settings = ProfileSettings(budgets=(1.0, 0.5), methods=("none", "random", "cdpruner"), warmups=0, repetitions=1)
    rows = last(loaded, [CASE], MOTION, settings).rows
    names = [row.name for row in rows]
    assert names == ["Hugging Face", "budget 1.0", "bound -b 0.5", "random -b 0.5", "cdpruner -b 0.5"]
    assert rows[-1].counts.tokens == rows[-2].counts.tokens  # the text after the video is the question
    quantised = profile.all_rows([CASE], ProfileSettings(budgets=(1.0,), quantize=("none", "int8")))
    assert [(row.method, row.quantize) for row in quantised[1:]] == [("none", "none"), ("none", "int8")]
    assert (str(Case(1, 8, 9)), str(Case(2, 8, 9))) == ("an image of 8x9", "2 frames of 8x9")


def test_presets_are_rows_with_their_names():
    settings = ProfileSettings(budgets=(0.1, "fast"), methods=("random", "divprune+fastv:share=1"))
    rows = [row for row in profile.all_rows([CASE], settings) if row.kind == METHOD]
    assert [row.name for row in rows if row.method == "random"] == ["random -b 0.1", "random -b fast"]
    assert [row.budget for row in rows] == [0.1, 0.1, "fast", "fast"]


def test_a_method_may_have_settings(loaded):
    settings = ProfileSettings(budgets=(0.5,), methods=("evoprune:alpha=3",), warmups=0, repetitions=1)
    rows = last(loaded, [CASE], MOTION, settings).rows
    assert [row.name for row in rows if row.samples][-1] == "evoprune:alpha=3 -b 0.5" and not any(
        row.error for row in rows
    )


@pytest.mark.parametrize("case", [CASE, Case(2, 28, 28)])
def test_transformers_generates_what_budget_one_does(loaded, case):
    clip = clips.prepare(loaded, *MOTION(case))
    theirs = run_hugging_face(loaded, hugging_face_model(loaded.model), clip, 12)
    ours = run_evoprune(loaded, clip, unpruned(loaded, clip), PruneOptions(1.0, "none").config(), 12)
    assert len(set(theirs.tokens)) > 1
    assert ours.tokens == theirs.tokens and ours.counts == theirs.counts


def test_generation_is_forced(loaded, monkeypatch):
    """An end-of-sequence token does not stop generation."""
    clip = clips.prepare(loaded, *MOTION(CASE))
    run = partial(run_evoprune, loaded, clip, unpruned(loaded, clip), PruneOptions(1.0, "none").config(), 6)
    first = run().tokens
    assert len(first) == 6
    monkeypatch.setattr(loaded, "eos_ids", tuple(first))
    assert run().tokens == first


class Time:
    """A clock that each round advances by its entry of `lasts` seconds."""

    def __init__(self, *lasts: float):
        self.lasts, self.now, self.titles = list(lasts), 100.0, []

    def run_round(self, title: str, rounds: int) -> tuple[str]:
        self.titles.append((title, rounds))
        self.now += self.lasts.pop(0)
        return (title,)


@pytest.mark.parametrize(
    ("lasts", "warmups", "repetitions", "limit", "run"),
    [
        ((10, 10, 10, 10), 1, 3, 40, ["warm-up 1 of 1", "round 1 of 3", "round 2 of 3", "round 3 of 3"]),
        ((10, 10, 10), 1, 3, 39, ["warm-up 1 of 1", "round 1 of 3", "round 2 of 3"]),
        ((10, 50), 1, 3, 20, ["warm-up 1 of 1", "round 1 of 3"]),
        ((99,), 3, 3, 5, ["warm-up 1 of 3", "counted"]),
        ((10, 10), 3, 3, 29, ["warm-up 1 of 3", "round 1 of 3"]),
        ((1, 1), 0, 2, 5, ["round 1 of 2", "round 2 of 2"]),
    ],
)
def test_the_rounds_that_end_within_the_time_limit(lasts, warmups, repetitions, limit, run):
    time = Time(*lasts)
    settings = ProfileSettings((0.5,), warmups=warmups, repetitions=repetitions, time_limit_s=limit)
    made = list(paced(time.run_round, settings.warmups, settings.repetitions, TimeLimit(limit, lambda: time.now)))
    kinds, titles = [kind for kind, _ in made], [title for title, _ in time.titles]
    assert [title for kind, (title,) in made if kind != "counted"] == titles and made[-1][1] == (titles[-1],)
    assert not time.lasts and titles == [title for title in run if title != "counted"]
    assert kinds == [title.partition(" ")[0] for title in run]
    # Rows are skipped only in the first round, and in the measured round that follows a warm-up.
    assert [rounds for _, rounds in time.titles] == [2 if warmups else 1] + [0] * (len(titles) - 1)


class Ticks(list):
    """Progress messages that double as a clock: every row and every other step takes ten seconds."""

    def limit(self, seconds: float) -> TimeLimit:
        return TimeLimit(seconds, lambda: 10.0 * len(self), 0.0)


@pytest.mark.parametrize(
    ("repetitions", "limit", "rounds", "warmups", "seconds", "note"),
    [(3, 120, 1, 1, 100, "1 of 3 rounds: another would have"), (1, 70, 1, 0, 60, "measured without a warm-up")],
)
def test_fewer_rounds_are_reported(loaded, repetitions, limit, rounds, warmups, seconds, note):
    ticks = Ticks()  # 20 s to prepare, and 40 s per round: matrix products and three rows
    settings = replace(SETTINGS, budgets=(0.5,), methods=("random",), repetitions=repetitions, time_limit_s=limit)
    results = last(loaded, [CASE], MOTION, settings, progress=ticks.append, limit=ticks.limit(limit))
    assert (results.rounds, results.warmups, results.seconds) == (rounds, warmups, seconds)
    assert any(each.startswith(note) for each in results.remarks) and len(results.matmul_rates) == rounds
    turns = ("matrix products", *(f"{name}, {CASE}" for name in ("Hugging Face", "budget 1.0", "random -b 0.5")))
    assert ticks[2:6] == [f"warm-up 1 of 1: {turn}" for turn in turns]


@pytest.mark.full
@pytest.mark.parametrize(("limit", "there"), [(1000, 12), (150, 5), (90, 3), (1, 3)])
def test_rows_that_would_end_too_late_are_left_out_and_named(loaded, limit, there):
    ticks = Ticks()
    results = last(loaded, [CASE, OTHER], MOTION, SETTINGS, progress=ticks.append, limit=ticks.limit(limit))
    names = [row.name for row in results.rows if row.kind != BOUND]
    assert names[:3] == ["Hugging Face", "budget 1.0", "evoprune-paper -b 0.5"] and len(names) == there
    said = [note for note in results.notes if note.startswith("left out")]
    if limit == 1000:
        assert said == [] and results.cases == [CASE, OTHER]
    else:
        assert f"all rows of {OTHER}" in said[0] and f"random -b 0.1, {CASE}" in said[0] and results.cases == [CASE]


def test_a_row_that_runs_out_of_memory_stays(loaded, monkeypatch):
    asked = []

    def encode(visual, patches, plan, **more):
        name = next((stage.reduce.merger.name for stage in plan.inside_pairs), None)
        asked.append((name, plan.keep))
        if name == "evoprune-paper" and plan.keep == 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(visual, patches, plan, **more)

    real = profile.encode_rows
    monkeypatch.setattr(profile, "encode_rows", encode)
    results = last(loaded, [CASE], MOTION, SETTINGS)
    failed = [row for row in results.rows if row.error]
    assert [(row.name, row.error, row.samples) for row in failed] == [
        ("evoprune-paper -b 0.1", "out of memory in encode", [])
    ]
    assert asked.count(("evoprune-paper", 5)) == 1  # not tried again
    assert all(len(row.samples) == 2 for row in results.rows if not row.error)
    bound = next(row for row in results.rows if row.name == "bound -b 0.1")
    assert bound.counts.tokens == 5 and results.figures(failed[0]) is None
    json.dumps(results.document())


def test_memory_is_checked_before_weights_are_read(saved, monkeypatch):
    monkeypatch.setattr(profile, "load_model", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(Device, "available_memory", lambda self: 10**6)
    with pytest.raises(OutOfMemory, match=r"needs about 7.* GiB of memory, and 1 MiB are available") as problem:
        profile.load(describe(ModelOptions("Qwen/Qwen2.5-VL-3B-Instruct", dtype="bf16", load_format="dummy")), [CASE])
    assert (
        problem.value.exit_code == 5
        and "--frames, --size" in problem.value.hint
        and "smaller model" in problem.value.hint
    )
    with pytest.raises(OutOfMemory):
        profile.load(describe(ModelOptions(str(saved))), [CASE])


@pytest.mark.parametrize("quantize", [("none",), ("none", "int8")])
def test_the_expected_memory_includes_copies_of_the_weights_that_fit(saved, loaded, monkeypatch, quantize):
    settings = ProfileSettings((0.5,), ("random",), quantize=quantize)
    run = profile.Profile(settings, ModelOptions(str(saved), dtype="fp32"), [CASE])
    models, missing, _ = profile.quantized_models(loaded, quantize, 0, lambda what: None)
    assert not missing
    plain = loaded.weights_bytes
    once = {name: model.weights_bytes for name, model in models.items()}
    working = profile.working_memory(loaded.model.config, CASE, loaded.video, 4)
    # Embeddings and norms are in all of these models, but not copied.
    assert plain + working < run.needs().memory <= plain + sum(once.values()) + working
    assert run.needs().memory > 0.85 * (plain + sum(once.values())) + working
    monkeypatch.setattr("evoprune.backend.Device.available_memory", lambda self: plain + working)
    assert run.needs().memory == plain + working


def test_random_weights_need_a_bundled_config(tmp_path, monkeypatch):
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    assert [profile.default_load_format(each) for each in (name, "demo")] == ["dummy", "auto"]
    (tmp_path / name).mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.chdir(tmp_path)
        assert profile.default_load_format(name) == "auto"  # a folder of that name has its own weights


def test_a_case_without_memory_is_not_run(loaded, monkeypatch):
    large = Case(64, 560, 560)
    enough = profile.working_memory(loaded.model.config, CASE, loaded.video, 4)
    monkeypatch.setattr(Device, "available_memory", lambda self: enough)

    def source(case):
        assert case != large
        return MOTION(case)

    results = last(loaded, [CASE, large], source, replace(SETTINGS, repetitions=1))
    assert all(len(row.samples) == 1 for row in results.of(CASE))
    for row in results.of(large):
        assert row.error.startswith("not run: needs about ") and not row.samples


def test_the_prompt_is_the_same_every_time(loaded):
    one, two = (clips.prepare(loaded, *MOTION(CASE)) for _ in range(2))
    assert torch.equal(one.ids, two.ids) and len(one.ids) == 48 + 30
    assert int(one.ids.max()) < loaded.model.config.text_config.vocab_size
    assert one.patches.shape == (192, 1176) and one.grid == (2, 4, 6) and one.following == int(one.positions.max()) + 1


@pytest.mark.parametrize("frames", [4, 40])
def test_frames_of_a_video(frames):
    info = probe("samples/square.mp4")  # six seconds
    pictures, seconds_per_pair = clips.video_frames(info, Case(frames, 84, 112))
    assert pictures.shape == (frames, 84, 112, 3) and pictures.dtype == torch.uint8
    assert seconds_per_pair == pytest.approx(12 / frames) and len(np.unique(pictures)) > 10


def test_methods_that_act_on_the_input_look_at_less(loaded):
    settings = ProfileSettings((0.25,), ("downscale", "subsample"), repetitions=1, warmups=0)
    (results,) = measure(loaded, [Case(8, 112, 168)], partial(clips.synthetic_frames, "motion"), settings)
    smaller, fewer = (row.counts for row in results.rows if row.kind == METHOD)
    assert (smaller.units, smaller.tokens, smaller.prompt) == (96, 24, 54)
    assert (fewer.units, fewer.tokens, fewer.prompt) == (96, 24, 54)
    full = next(row.counts for row in results.rows if row.kind == FULL)
    for counts in (smaller, fewer):
        assert counts.live_share == 0.25 and counts.encoder_rows == 24
        assert counts.tower_flop < full.tower_flop / 3


def test_frame_pairs_of_qwen3_stand_apart_and_generate_what_hugging_face_does(tmp_path):
    case = Case(4, 128, 192)
    loaded = profile.load(describe(ModelOptions(str(save_tiny(tmp_path, family="qwen3_vl")), dtype="fp32")), [case])
    clip = clips.prepare(loaded, *clips.synthetic_frames("motion", case, 32))
    theirs = run_hugging_face(loaded, hugging_face_model(loaded.model), clip, 4)
    ours = run_evoprune(loaded, clip, unpruned(loaded, clip), PruneOptions(1.0, "none").config(), 4)
    assert ours.tokens == theirs.tokens and ours.counts.tower_flop == theirs.counts.tower_flop
    assert ours.counts.prompt == theirs.counts.prompt == 30 + 2 * (24 + 8) == 30 + 16 + len(clip.place)


LARGE = Case(8, 224, 336)


def row(kind, encode, prefill, tokens=384, budget=1.0, method=None, prune=0.0, live=1.0, case=LARGE):
    """Return a row with one sample per round. Generation takes 2 s in the first round, 1 s in the second, then 3 s."""
    counts = Counts(384, int(384 * live), live, ((0, 384), (1, int(384 * live))), tokens, tokens + 30, live * 6e12)
    samples = [
        Sample(e, prune * e, p, g, peak_bytes=10**9 + i)
        for i, (e, p, g) in enumerate(zip(encode, prefill, (2.0, 1.0, 3.0), strict=False))
    ]
    return ProfileRow(kind, case, budget, method, counts, samples)


def results_of(*rows, rates=(1e12, 2e12, 1e12), **more):
    settings = {"new_tokens": 4, "repetitions": 3, "time_limit_s": 150.0}
    model = ModelFacts("some/model", None, "bf16", "none", "cpu", "dummy")
    env = Environment("0.1", "2.9", "5.23", "a processor", 2)
    return ProfileResults(model, 7 * 10**9, env, {}, settings, list(rows), list(rates), 1, 3, **more)


@pytest.fixture
def measured():
    """The machine is twice as slow in the second round, which affects the rows differently."""
    hugging_face = row(HUGGING_FACE, (8.0, 16.0, 9.0), (4.0, 8.0, 3.0))
    full = row(FULL, (6.0, 12.0, 6.0), (3.0, 6.0, 3.0), method="none")
    method = row(METHOD, (2.0, 6.0, 3.0), (1.0, 1.0, 1.0), 38, 0.1, "evoprune", prune=0.25, live=0.5)
    return results_of(hugging_face, full, bound_of(full, method), method)


def test_figures_are_medians_of_the_rounds_own(measured):
    """Figures use the median of the ratios (12/3, 24/7, 12/4), not the ratio of the medians."""
    first, full, bound, last = measured.rows
    method = measured.figures(last)
    assert method.vs_hf == pytest.approx(24 / 7)
    assert method.encode_vs_hf == pytest.approx(3.0)  # median of 4, 16/6, 3
    assert method.vs_bound == pytest.approx(13 / 7)  # median of 7/3, 13/7, 7/4
    assert median_ratio([1, 10, 100], [1, 1, 50]) == 2
    assert method.encode == Spread(3.0, 2.0, 6.0) and method.first_token == Spread(4.0, 3.0, 7.0)
    assert method.generate_tok_s == pytest.approx(1.5)  # median of 3/2, 3/1, 3/3; the first token needs no pass
    assert method.prune_share == 0.25 and method.peak_bytes == 10**9 + 2
    assert measured.figures(first).matmul_share == pytest.approx(
        6 / 9
    )  # operations / seconds / rate: median of 6/8, 6/32, 6/9
    assert method.matmul_share == pytest.approx(1.0)  # median of 3/2, 3/12, 3/3
    figures = measured.figures(bound)
    assert figures.matmul_share is figures.vs_bound is figures.peak_bytes is None and figures.vs_hf == pytest.approx(
        12 / 7
    )
    assert (bound.counts.tokens, bound.counts.prompt, bound.counts.live_share) == (38, 68, 1)
    assert bound.seconds("encode") == full.seconds("encode") and bound.seconds("prune") == [0, 0, 0]
    assert bound.seconds("prefill") == last.seconds("prefill")


def test_a_bound_belongs_to_its_budget_and_case():
    full = row(FULL, (6.0,), (3.0,))
    rows = [full]
    for budget, prefill in ((0.5, 2.0), (0.1, 1.0)):
        method = row(METHOD, (2.0,), (prefill,), budget=budget, method="evoprune")
        rows += [bound_of(full, method), method]
    elsewhere = row(FULL, (100.0,), (100.0,), case=Case(16, 224, 336))
    found = results_of(*rows, elsewhere, rates=(1e12,))
    assert [found.figures(r).vs_bound for r in found.rows] == [None, None, 8 / 4, None, 7 / 3, None]
    assert [found.figures(r).vs_hf for r in found.rows] == [None] * 6
    assert found.cases == [LARGE, Case(16, 224, 336)] and found.of(found.cases[1]) == [elsewhere]


def test_a_bound_spends_no_time_on_pruning_in_the_language_model():
    """Nor does it mix the exact tower's time with a quantized language model's, if there is another row."""
    full = row(FULL, (6.0,), (3.0,), method="none")
    inside = row(METHOD, (6.0,), (2.5,), 38, 0.1, "fastv")
    small = replace(row(METHOD, (3.0,), (0.5,), 38, 0.1, "divprune"), quantize="int8")
    after = row(METHOD, (6.0,), (1.0,), 38, 0.1, "divprune")
    for rows, expected in (([inside, small, after], 1.0), ([inside, small], 0.5), ([inside], 2.5)):
        bound = next(found for found in profile._with_bounds([full, *rows]) if found.kind == BOUND)
        assert bound.seconds("prefill") == [expected]


def test_the_chart_has_methods_that_ran_in_8_bits_only():
    full = row(FULL, (6.0, 6.0, 6.0), (3.0, 3.0, 3.0), method="none")
    small = replace(row(METHOD, (2.0, 2.0, 2.0), (1.0, 1.0, 1.0), 38, 0.1, "evoprune", live=0.5), quantize="int8")
    drawn = ElementTree.fromstring(results_of(full, small).chart())
    assert "-b 0.1" in {text.text for text in drawn.iter() if text.tag.endswith("text")}


def test_why_there_are_fewer_rounds():
    assert results_of().remarks == []
    short = results_of(warmup_seconds=170.0)
    short.rounds = 1
    assert short.remarks == [
        "1 of 3 rounds: another would have exceeded the time limit of 150 s",
        "the warm-up took 170 s, more than the time limit of 150 s",
    ]
    short.interrupted, short.warmup_seconds = True, 20.0
    assert short.remarks == ["interrupted: 1 of 3 rounds finished"]


def test_the_document(measured):
    measured.rows.append(ProfileRow(METHOD, LARGE, 0.5, "evoprune", error="out of memory in encode"))
    document = json.loads(json.dumps(measured.document(), allow_nan=False))
    assert document["schema"] == "evoprune/profile@1"
    assert document["rounds"] == {"warmup": 1, "measured": 3, "seconds": 0.0, "interrupted": False}
    assert document["matmul"] == {"flop_per_s": 10**12, "samples": [10**12, 2 * 10**12, 10**12]}
    assert document["model"]["load_format"] == "dummy" and document["env"]["threads"] == 2
    *_, method, failed = document["rows"]
    assert [*method["time_ms"].values()] == [3000, 750, 1000, 0, 2000, 4000]
    assert method["ratio"]["first_token_to_hugging_face"] == 3.4286
    assert method["counts"]["layers"] == [[0, 384], [1, 192]]
    assert [sample["encode"] for sample in method["samples"]] == [2000, 6000, 3000]
    assert failed.keys() == method.keys() and failed["error"] == "out of memory in encode"
    for part in ("time_ms", "rate", "ratio", "memory"):
        assert failed[part].keys() == method[part].keys() and set(failed[part].values()) == {None}


@pytest.mark.full
def test_quantised_weights_have_rows_of_their_own(loaded):
    settings = replace(SETTINGS, budgets=(0.5,), methods=("evoprune",), quantize=("none", *KINDS))
    found = last(loaded, [CASE], MOTION, settings)
    names = ["evoprune -b 0.5", *(f"evoprune -b 0.5 {kind}" for kind in KINDS)]
    assert [row.name for row in found.rows if row.kind == METHOD] == names
    assert [row.quantize for row in found.rows if row.kind == METHOD] == list(settings.quantize)
    assert not any(row.error for row in found.rows)
    # transformers still runs on plain weights.
    assert type(loaded.model.model.language_model.layers[0].mlp.up_proj) is torch.nn.Linear


def test_no_bound_without_budget_one(loaded, monkeypatch):
    def run(loaded, clip, plan, method, *more):
        if method.name == "none":
            raise OutOfMemory("out of memory in prefill")
        return run_evoprune(loaded, clip, plan, method, *more)

    monkeypatch.setattr(profile, "run_evoprune", run)
    results = last(loaded, [CASE], MOTION, replace(SETTINGS, budgets=(0.5,), methods=("random",)))
    assert [row.error for row in results.rows] == [None, *["out of memory in prefill"] * 2, None]
    assert results.figures(results.rows[-1]).vs_bound is None and results.figures(results.rows[-1]).vs_hf > 0


def test_peak_memory_counts_from_where_it_is_reset():
    if not Device("cpu").reset_peak_memory():
        pytest.skip("this system cannot reset it")
    before = Device("cpu").peak_memory()
    held = np.ones(2**26, np.uint8)
    while_held = Device("cpu").peak_memory()
    del held
    Device("cpu").reset_peak_memory()
    assert while_held >= before + 2**25 and Device("cpu").peak_memory() <= while_held - 2**25


def test_the_matrix_product_rate_is_that_of_the_best_shape():
    tiny = ((1, 1, 1),)
    assert matmul_rate(torch.float32, seconds=0.02, shapes=((256, 256, 256), *tiny)) > 100 * matmul_rate(
        torch.float32, seconds=0.02, shapes=tiny
    )
