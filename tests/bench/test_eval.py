"""Running an evaluation: how often inputs are encoded, the reported cost, and resuming after an interruption."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from evoprune import methods
from evoprune.backend import Device, limits
from evoprune.batch import Row
from evoprune.bench import eval as evaluation
from evoprune.bench import shared
from evoprune.bench.eval import COST_MODEL, EvalSettings, Evaluation, threads_of_each, variants
from evoprune.bench.eval_folder import RunFolder
from evoprune.bench.questions import VideoQuestions, load_questions
from evoprune.bench.shared import gray_frames
from evoprune.errors import OutOfMemory, UsageError
from evoprune.language import GenerationOptions
from evoprune.methods import Budget
from evoprune.model import Cost
from evoprune.session import ModelOptions, describe, encoding, open_inputs
from evoprune.video import SamplingOptions, probe
from evoprune.video_qa import VideoQA
from tests.methods.tokens import AFTER
from tests.quantized import parameters
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny

SAMPLES = Path("samples")
CLIPS = ("square.mp4", "three.mp4", "vanish.webm", "flash.mp4")


@pytest.fixture(scope="module")
def loaded(saved):
    return evaluation.load_model(str(saved), dtype="fp32")


def videos(names=CLIPS):
    made = []
    for name in names:
        rows = tuple(
            Row(f"{name}-{i}", (name,), (name,), q, answer="blue", type=f"t{i}", groups=("g",))
            for i, q in enumerate(("What?", "Why?"))
        )
        made.append(VideoQuestions(name, SAMPLES / name, rows))
    return made


def spans(name, *parts):
    """Return a video with one question about each part."""
    rows = (Row(f"{a}-{b}", (name,), (name,), "What?", a, b, answer="blue") for a, b in parts)
    return VideoQuestions(name, SAMPLES / name, tuple(rows))


LITTLE = {"sampling": SamplingOptions(frames=4), "generation": GenerationOptions(max_new_tokens=2)}
SETTINGS = EvalSettings("q.jsonl", (0.5, 0.25), ("random",), **LITTLE)


def begun(loaded, settings=SETTINGS, clips=None, folder=None, resume=False) -> Evaluation:
    made = Evaluation(settings, videos() if clips is None else clips)
    if folder:
        made.keep_in(folder, resume)
    made.loaded = loaded
    return made


def test_full_comes_first_and_nothing_twice():
    asked = replace(SETTINGS, budgets=(0.5, 1.0), methods=("none", "random", "pool"), blind=True)
    assert [variant.name for variant in variants(asked)] == ["full", "blind", "random -b 0.5", "pool -b 0.5"]
    assert [variant.name for variant in variants(replace(SETTINGS, budgets=(1.0,)))] == ["full"]


def test_a_method_may_have_settings_and_a_row_may_have_a_limit_of_its_own(loaded):
    asked = replace(SETTINGS, budgets=(0.5,), methods=("none", "evoprune:alpha=3"), blind=True)
    (clip,) = videos(CLIPS[:1])
    short = replace(clip.rows[0], max_new_tokens=1, groups=("h",))
    run = begun(loaded, replace(asked, groups=("h", "i")), [replace(clip, rows=(short, clip.rows[1]))])
    run.run()
    assert [(s["row"], s["id"]) for s in run.samples] == [(row, short.id) for row in ("full", "blind", "method")]
    notes = run.document()["notes"]
    assert any(note.startswith("3 of 3 answers") for note in notes)
    video = VideoQA(loaded, budget=1.0).encode(SAMPLES / CLIPS[0], frames=4)
    assert run.samples[0]["answer"] == video.ask("What?", max_new_tokens=1).text


def test_each_video_is_encoded_once_for_all_its_questions(loaded, monkeypatch):
    encoded, real = [], evaluation.open_inputs

    def opened(session, paths, sampling, **more):
        if more["frames"] or more["tower"]:  # reading ahead does not count
            encoded.append(
                (
                    Path(paths[0]).name,
                    session.pruning.name,
                    session.pruning.budget.recorded,
                    more["frames"] is gray_frames,
                )
            )
        return real(session, paths, sampling, **more)

    monkeypatch.setattr(evaluation, "open_inputs", opened)
    run = begun(loaded, replace(SETTINGS, blind=True, limit=2))
    run.run()
    expected = [("none", 1.0, False), ("none", 1.0, True), ("random", 0.5, False), ("random", 0.25, False)]
    assert encoded == [(name, *each) for name in CLIPS[:2] for each in expected]
    assert len(run.samples) == 2 * 4 * 2 and run.document()["videos"] == {"wanted": 2, "evaluated": 2, "failed": 0}


def test_rows_are_about_parts_which_may_be_missing(loaded, tmp_path, monkeypatch):
    """Each part is encoded once for all variants, and results show one video. A row whose part is missing fails alone."""
    opened, real = [], evaluation.open_inputs

    def counted(session, paths, sampling, **more):
        if more["frames"] or more["tower"]:  # reading ahead does not count
            opened.append((sampling.start_s, sampling.end_s))
        return real(session, paths, sampling, **more)

    monkeypatch.setattr(evaluation, "open_inputs", counted)
    Image.new("RGB", (112, 112), (200, 0, 0)).save(tmp_path / "p.png")
    row = Row("p", ("p.png",), (str(tmp_path / "p.png"),), "What?", 1.0, answer="blue")
    parts = (0.0, None), (1.0, 3.0), (-2.0, None), (1.0, 3.0)
    clips = [
        VideoQuestions("p.png", tmp_path / "p.png", (row,)),
        replace(spans("square.mp4", (200.0, None), (0.0, 1.0)), name="late"),
        spans("square.mp4", *parts),
    ]
    run = begun(loaded, replace(SETTINGS, budgets=(0.25,)), clips)
    run.run()
    made = run.document()
    assert opened[-6:] == [part for part in parts[:3] for _ in range(2)] and len(run.samples) == 11
    assert made["videos"] == {"wanted": 3, "evaluated": 1, "failed": 2} and run.failed
    assert made["items"] == {"answered": 4, "failed": 3}
    assert [f["message"] for f in made["failures"]] == [
        "start 200 s is after the end of the video, which is 6 s long",
        f"{tmp_path / 'p.png'} is an image, which has no start or end",
    ]


@pytest.mark.full
def test_samples_say_what_ask_says(loaded):
    """The pipeline gives the same answers, counts and shares when it answers each question on its own."""
    run = begun(loaded, replace(SETTINGS, methods=("evoprune", "downscale", "cdpruner")))
    run.run()
    for sample in run.samples[:14]:
        qa = VideoQA(loaded, budget=sample["budget"], method=sample["method"])
        video = qa.encode(SAMPLES / sample["video"], frames=4)
        answer = video.ask(sample["question"], max_new_tokens=2)
        assert "".join(answer) == sample["answer"]
        report = answer.report
        assert sample["tokens"] == report.pruning.visual_tokens_kept and sample["prompt"] == report.tokens.prompt
        assert sample["live_share"] == report.pruning.encoder_live_share and sample["units"] == 48
        assert sample["right"] == (sample["answer"].strip() == "blue")


def test_operations_at_3b(loaded):
    """Unpruned, every layer of the 3B model computes all units of two grids of 4x6, which form two windows each."""
    run = begun(loaded, clips=videos(CLIPS[:1]))
    run.run()
    cost = Cost(describe(ModelOptions(COST_MODEL, load_format="dummy")).config)
    full, half = run.samples[0], run.samples[2]
    assert full["tflop_3b_tower"] == pytest.approx(cost.tower_flop([48] * 33, 2, 2) / 1e12)
    assert full["tflop_3b_prefill"] == pytest.approx(cost.prefill_flop(full["prompt"]) / 1e12)
    assert full["tflop_3b"] == full["tflop_3b_tower"] + full["tflop_3b_prefill"]
    assert half["tflop_3b_tower"] == full["tflop_3b_tower"] and half["tflop_3b_prefill"] < full["tflop_3b_prefill"]
    run = begun(loaded, replace(SETTINGS, methods=("evoprune-paper",), budgets=(0.5,)), videos(CLIPS[:1]))
    run.run()
    rows = [48] * 16 + [24] * 17  # two layers; the first merges half of the rows
    rows_of_two = (
        VideoQA(loaded, budget=0.5, method="evoprune-paper").encode(SAMPLES / CLIPS[0], frames=4).report.pruning.layers
    )
    assert [rows_of_two[0][1], rows_of_two[1][1]] == [48, 24]
    assert run.samples[2]["tflop_3b_tower"] == pytest.approx(cost.tower_flop(rows, 2, 2) / 1e12)


def test_what_leaves_inside_the_language_model_costs_less(loaded):
    run = begun(loaded, replace(SETTINGS, methods=("random+fastv",), budgets=(0.5,)), videos(CLIPS[:1]))
    run.run()
    video = VideoQA(loaded, budget=0.5, method="random+fastv").encode(SAMPLES / CLIPS[0], frames=4)
    answer, sample = video.ask("What?", max_new_tokens=1), run.samples[2]
    assert answer.text is not None
    read = [count for _, count in answer.report.pruning.language_layers]
    assert sample["tokens"] == read[0] > sample["layer_tokens"] == sum(read) / len(read)
    cost = Cost(describe(ModelOptions(COST_MODEL, load_format="dummy")).config)
    whole = cost.prefill_flop(sample["prompt"]) / 1e12
    assert 0.5 * whole < sample["tflop_3b_prefill"] < whole


def test_the_blind_row_sees_nothing_but_size_and_length(loaded, monkeypatch):
    info = probe(SAMPLES / "square.mp4")
    opened = open_inputs(VideoQA(loaded).session, [info.path], SamplingOptions(frames=4), frames=gray_frames)
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    chunks = list(gray_frames(opened.plans[0], iter(())))
    assert [chunk.first for chunk in chunks] == [0, 2] and all((chunk.pixels == 128).all() for chunk in chunks)
    assert chunks[0].pixels.shape == (2, info.height, info.width, 3) and chunks[0].pixels.dtype == np.uint8
    run = begun(loaded, replace(SETTINGS, blind=True), videos(("square.mp4", "three.mp4")))
    run.run()
    blind = [(s["question"], s["answer"], s["tokens"]) for s in run.samples if s["row"] == "blind"]
    assert blind[:2] == blind[2:]  # two videos of the same size and length look the same to it


@pytest.mark.full
def test_methods_that_draw_lots_do_so_anew_for_each_video_but_alike_in_every_run(loaded):
    def kept(seed):
        seen = []
        for name in CLIPS[:2]:
            seen.append(begun(loaded, replace(SETTINGS, seed=seed), videos((name,))))
            seen[-1].run()
        return [[s["answer"] for s in run.samples] for run in seen]

    assert kept(0) == kept(0) != kept(1)
    seeds, real = [], evaluation.Session
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "Session", lambda m, p: seeds.append(p.seed) or real(m, p))
        kept(0), kept(1), kept(2**31 - 1)
    assert len(set(seeds)) == 6 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.full
def test_a_video_that_fails_is_counted_and_in_no_row(loaded, monkeypatch):
    missing = VideoQuestions("gone.mp4", SAMPLES / "gone.mp4", videos()[0].rows)
    run = begun(loaded, clips=[videos()[0], missing, videos()[1]])
    run.run()
    document = run.document()
    assert run.failed and document["videos"] == {"wanted": 3, "evaluated": 2, "failed": 1}
    assert document["items"] == {"answered": 4, "failed": 2} and document["rows"][0]["n"] == 4
    assert document["failures"] == [{"video": "gone.mp4", "message": "no such file: samples/gone.mp4"}]
    real = evaluation.open_inputs

    def opened(session, paths, *args, **more):
        if session.pruning.name == "random" and Path(paths[0]).name == "three.mp4":
            raise OutOfMemory("out of memory in encode", stage="encode")
        return real(session, paths, *args, **more)

    monkeypatch.setattr(evaluation, "open_inputs", opened)
    run = begun(loaded, clips=videos(CLIPS[:2]))
    run.run()
    assert {row["n"] for row in run.document()["rows"] if row["group"] == "all"} == {2}  # also in full, for pairs


def test_a_video_is_read_once_for_all_rows_that_look_at_the_same_pixels(loaded, monkeypatch):
    read, real = [], encoding.read_chunks

    def counted(info, times_s, **how):
        read.append((Path(info.path).name, len(times_s)))
        return real(info, times_s, **how)

    monkeypatch.setattr(encoding, "read_chunks", counted)
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)  # also if it comes in several chunks
    settings = replace(SETTINGS, methods=("random", "subsample"), blind=True)
    run = begun(loaded, settings, videos(CLIPS[:2]))
    run.run()
    # Four frames for most rows, and two for the row that takes fewer (at least one grid).
    assert sorted(read) == sorted((Path(name).name, frames) for name in CLIPS[:2] for frames in (4, 2))


def test_more_copies_of_the_model_than_fit_are_refused(loaded, monkeypatch):
    run = begun(loaded, SETTINGS, videos(CLIPS[:1]))
    monkeypatch.setattr(Device, "available_memory", lambda self: 3 * loaded.weights_bytes)
    monkeypatch.setattr(evaluation, "map_in_processes", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(OutOfMemory, match=r"^4 copies of .*: needs about") as caught:
        run.run(processes=4)
    assert "--processes" in caught.value.hint


@pytest.mark.parametrize("kind", parameters("int8"))
def test_copies_are_counted_as_they_are_read(tmp_path, monkeypatch, kind):
    """transformers reads all weights in the dtype of their files, before they are quantised."""
    loaded = evaluation.load_model(
        str(save_tiny(tmp_path, family="qwen3_5")), engine="transformers", dtype="fp32", quantize=kind
    )
    run = begun(loaded, SETTINGS, videos(CLIPS[:1]))
    monkeypatch.setattr(Device, "available_memory", lambda self: 3 * loaded.weights_bytes)
    monkeypatch.setattr(evaluation, "map_in_processes", lambda *_: pytest.fail("processes were started"))
    with pytest.raises(OutOfMemory, match=r"^2 copies of .*: needs about"):
        run.run(processes=2)


@pytest.mark.full
def test_a_process_gives_the_same_samples(loaded, saved, monkeypatch):
    """Runs in this process the code that other processes would run, on pickled data."""
    sent = []

    def map_here(start, clips, processes):
        work = pickle.loads(pickle.dumps(start))()
        for video in clips:
            sent.append(video)
            yield pickle.loads(pickle.dumps(work(pickle.loads(pickle.dumps(video)))))

    monkeypatch.setattr(evaluation, "map_in_processes", map_here)
    model = ModelOptions(str(saved), dtype="fp32")
    settings = replace(SETTINGS, budgets=(0.5,), model=model, groups=("g",))
    runs = []
    for processes in (1, 2):
        run = Evaluation(settings, videos(CLIPS[:2]))
        run.loaded = loaded
        run.run(processes=processes)
        runs.append(run.samples)
    assert len(runs[0]) == 2 * 2 * 2 and runs[0] == runs[1]
    assert [video.name for video in sent] == list(CLIPS[:2])


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.mark.few(1)
@pytest.mark.parametrize("at", [6, 1, 11])
def test_an_interrupted_run_goes_on_and_ends_the_same(loaded, tmp_path, monkeypatch, at):
    whole = begun(loaded, folder=tmp_path / "whole")
    whole.run()
    whole.folder.finish(whole.document())
    shown, real = [], evaluation.open_inputs

    def opened(*args, **more):
        if more["frames"] or more["tower"]:  # reading ahead does not count
            shown.append(args)
            if len(shown) == at:
                raise KeyboardInterrupt
        return real(*args, **more)

    monkeypatch.setattr(evaluation, "open_inputs", opened)
    torn = begun(loaded, folder=tmp_path / "torn")
    with pytest.raises(KeyboardInterrupt):
        torn.run()
    torn.folder.finish(torn.document({"code": 130}))
    assert results(tmp_path / "torn")["videos"]["evaluated"] == (at - 1) // 3
    again = begun(loaded, folder=tmp_path / "torn", resume=True)
    again.run()
    again.folder.finish(again.document())
    assert len(shown) - at == 3 * (4 - (at - 1) // 3)  # finished videos are not encoded again
    for name in ("results.json", "settings.json", "samples.jsonl"):
        assert (tmp_path / "torn" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.few(1)
@pytest.mark.parametrize("cut", [1, 500])
def test_a_torn_file_is_mended(loaded, tmp_path, cut):
    whole = begun(loaded, folder=tmp_path / "run")
    whole.run()
    file = tmp_path / "run" / "samples.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-cut])
    again = begun(loaded, folder=tmp_path / "run", resume=True)
    assert 0 < len(again.samples) < len(whole.samples) + (cut == 1) and again.samples[-1]["last"]
    again.run()
    assert file.read_bytes() == content


@pytest.fixture
def three_videos(tmp_path):
    """A run with three videos of two samples each, in a folder of its own."""
    made = RunFolder.create(tmp_path / "run", {"seek": "auto"})
    for video in "abc":
        made.add([{"video": video, "id": f"{video}{number}", "right": True} for number in range(2)])
    return made


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\n", b"\n\n"), (b"\n", b"\r\n"), (b"{", b"\n{"), (b"\n", b"\n \n"), (b"}\n", b"}\n\0\0"), (b"}\n", b"}"),
    ],
)  # fmt: skip
def test_empty_lines_are_no_damage(three_videos, old, new):
    file = three_videos.path / "samples.jsonl"
    content = file.read_bytes()
    changed = content.replace(old, new)
    if new.startswith(b"}"):  # only at the end
        changed = content[: -len(old)] + new
    file.write_bytes(changed)
    assert [each["id"] for each in RunFolder.resume(three_videos.path, {"seek": "auto"}).samples] == [
        "a0", "a1", "b0", "b1", "c0", "c1"
    ]  # fmt: skip
    assert file.read_bytes() == content


@pytest.mark.parametrize("line", ["x", "[]", "5", '{"id":"b0"}', "[" * 10**5, '{"video":"b"'])
def test_a_damaged_line_never_costs_the_samples_after_it(three_videos, line):
    file = three_videos.path / "samples.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = line
    file.write_text("\n".join(lines) + "\n")
    before = file.read_bytes()
    with pytest.raises(UsageError, match=r"samples\.jsonl, line 3 is not a sample"):
        RunFolder.resume(three_videos.path, {"seek": "auto"})
    assert file.read_bytes() == before


def test_other_settings_are_refused(loaded, tmp_path):
    begun(loaded, folder=tmp_path / "run")
    for changes in (
        {"budgets": (0.5,)},
        {"seed": 1},
        {"digest": "0"},
        {"version": "0"},
        {"model": ModelOptions("other")},
    ):
        with pytest.raises(UsageError, match=f"other settings: {next(iter(changes))} was"):
            begun(loaded, replace(SETTINGS, **changes), folder=tmp_path / "run", resume=True)
    with pytest.raises(UsageError, match="not the folder of an evaluation"):
        begun(loaded, folder=tmp_path / "nothing", resume=True)


def test_a_record_of_settings_holds_numbers_and_names():
    asked = replace(SETTINGS, budgets=(0.25, 1.0, "fast", "auto"))
    written = json.loads(json.dumps(asked.record()))
    assert written["budgets"] == [0.25, 1.0, "fast", "auto"]
    again = EvalSettings.of_record(written, ModelOptions())
    assert again.budgets == asked.budgets and again.record() == asked.record()
    with pytest.raises(UsageError, match="budget 'fats' is not"):
        EvalSettings.of_record(written | {"budgets": ["fats"]}, ModelOptions())


def test_going_on_where_other_sizes_are_pruned_after_the_tower_is_refused(saved, loaded, tmp_path, monkeypatch):
    asked = replace(SETTINGS, model=ModelOptions(str(saved)), methods=("evoprune", "random"))
    for begun_with, goes_on_with in ((0, 2048), (2048, 0), (2048, 1024), (2048, 2048)):
        folder = tmp_path / f"{begun_with}-{goes_on_with}"
        monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", begun_with)
        first = Evaluation(asked, videos())
        first.load()
        first.keep_in(folder)
        written = json.loads((folder / "settings.json").read_text())
        assert written.get("after_tower_below", 0) == begun_with
        assert any("only after the tower" in note for note in first.document()["notes"]) == bool(begun_with)
        assert EvalSettings.of_record(written, ModelOptions()).methods == asked.methods
        monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", goes_on_with)
        again = Evaluation(asked, videos())
        again.keep_in(folder, resume=True)
        if begun_with == goes_on_with:
            again.load()
            continue
        with pytest.raises(
            UsageError, match="started on another device or version: the size limit for pruning only after the tower"
        ) as caught:
            again.load()
        assert "--device" in caught.value.hint
    always = replace(asked, methods=("evoprune:inner=always", "random"))
    other = Evaluation(always, videos())
    other.load()
    other.keep_in(tmp_path / "always")
    assert "after_tower_below" not in json.loads((tmp_path / "always" / "settings.json").read_text())


@pytest.mark.parametrize("changed", ["model.safetensors", "square.mp4"])
def test_a_model_or_a_video_that_was_replaced_is_refused(loaded, folder, tmp_path, changed):
    """Runs of earlier versions, which did not record the state, are accepted."""
    (tmp_path / "square.mp4").write_bytes((SAMPLES / "square.mp4").read_bytes())
    clips = [VideoQuestions("square.mp4", tmp_path / "square.mp4", videos()[0].rows)]
    asked = replace(SETTINGS, model=ModelOptions(str(folder)))
    begun(loaded, asked, clips, tmp_path / "run").run()
    begun(loaded, asked, clips, tmp_path / "run", resume=True)
    os.utime((folder if "model" in changed else tmp_path) / changed, (1, 1))
    what = "the model" if "model" in changed else changed
    with pytest.raises(UsageError, match=f"{what} has changed since .*run was started: ") as caught:
        begun(loaded, asked, clips, tmp_path / "run", resume=True)
    assert caught.value.hint
    for name in ("settings.json", "samples.jsonl"):
        file = tmp_path / "run" / name
        lines = [json.loads(file.read_text())] if name == "settings.json" else map(json.loads, file.open())
        file.write_text("".join(json.dumps({k: v for k, v in each.items() if k != "files"}) + "\n" for each in lines))
    assert len(begun(loaded, asked, clips, tmp_path / "run", resume=True).samples) == 6


def test_a_folder_that_is_there_gets_a_sibling(loaded, tmp_path):
    paths = [begun(loaded, folder=tmp_path / "a" / "run").folder.path.name for _ in range(3)]
    assert paths == ["run", "run-2", "run-3"]
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot write"):
        begun(loaded, folder=tmp_path / "file" / "run")


@pytest.mark.full
def test_the_demo_model_on_the_sample_questions():
    """The questions were chosen so: all right unpruned and by default, while a twentieth of the tokens loses some."""
    run = Evaluation(
        EvalSettings("samples/questions.jsonl", (Budget.DEFAULT, 0.05)), load_questions(SAMPLES / "questions.jsonl")
    )
    run.load()
    run.run()
    document = run.document()
    assert [(row["right"], row["n"]) for row in document["rows"]] == [(12, 12), (12, 12), (8, 12)]
    lost = {sample["id"]: (sample["answer"], sample["budget"]) for sample in run.samples if not sample["right"]}
    assert lost == {"02": ("appears", 0.05), "03": ("4", 0.05), "05": ("stays", 0.05), "07": ("vanishes", 0.05)}
    assert not document["failures"]
    assert torch.get_num_threads() == 1


REUSING = ("evoprune", "evoprune:alpha=0", "reuse+divprune", "reuse+scope", "reuse+cdpruner", "evoprune:depth=1")


def samples(loaded, settings, clips) -> list[dict]:
    run = begun(loaded, settings, clips)
    run.run()
    return run.samples


@pytest.fixture
def towers(monkeypatch) -> list[tuple]:
    """Reuse threshold, number of selections between layers, and tokens to keep, for each video that passes the tower."""
    seen, real = [], shared.encode_rows

    def encode_rows(visual, patches, plan, **how):
        seen.append((plan.reuse, len(plan.row_stages), plan.keep))
        return real(visual, patches, plan, **how)

    monkeypatch.setattr(shared, "encode_rows", encode_rows)
    return seen


@pytest.mark.full
@pytest.mark.parametrize("names", [AFTER, (*REUSING, "evoprune-paper", "downscale", "reuse:threshold=5+divprune")])
def test_shared_rows_give_the_same_samples(loaded, names, monkeypatch, towers):
    settings = replace(SETTINGS, methods=names)
    together = samples(loaded, settings, videos(CLIPS[:1]))
    few = len(towers)

    class Alone(shared.SharedRows):
        def encode_rows(self, *args, **how):
            self._held.clear()
            return super().encode_rows(*args, **how)

    monkeypatch.setattr(evaluation, "SharedRows", Alone)
    assert samples(loaded, settings, videos(CLIPS[:1])) == together
    assert len(towers) - few == len(variants(settings)) > few


def test_selectors_after_the_same_tower_share_rows(loaded, towers):
    settings = replace(SETTINGS, methods=(*REUSING, "divprune", "random", "reuse:threshold=5+divprune"))
    samples(loaded, settings, videos(CLIPS[:1]))
    inside = [(8.0, 2, 24), (8.0, 2, 12)]  # evoprune selects inside the tower, with different rows in each variant
    needs = {methods.MethodChain.parse(name).token_selector.needs for name in REUSING[2:]}
    after_reuse = [(8.0, 0, 24)] * len(needs)  # once for selectors that need attention, keys, both or nothing
    assert len(needs) >= 2 and frozenset() in needs  # evoprune:depth=1 shares the rows of reuse+divprune
    other_threshold, after = (5.0, 0, 24), (0.0, 0, 24)  # random shares the rows of divprune
    assert towers == [(0.0, 0, 48), *inside * 2, *after_reuse, after, other_threshold]


def test_methods_with_shared_rows_have_their_own_pruning_times(loaded):
    names = ("random", "divprune", "scope", "cdpruner")
    run = Evaluation(replace(SETTINGS, methods=names, timed=True), videos(CLIPS[:1]))
    run.loaded = loaded
    run.run()
    times = {}
    for sample in run.samples:
        times.setdefault((sample["method"], sample["budget"]), set()).add(sample["prune_ms"])
    # One time for all questions, unless the selection depends on them; and no two methods share a time.
    assert all(len(spent) == (2 if name == "cdpruner" else 1) for (name, _), spent in times.items())
    every = [ms for spent in times.values() for ms in spent]
    assert len(set(every)) == len(every) == 11 and min(every) > 0


@pytest.mark.full
def test_what_failed_is_tried_again(loaded, tmp_path):
    moved = tmp_path / "square.mp4"
    clips = [VideoQuestions("square.mp4", moved, videos()[0].rows), videos()[1]]
    first = begun(loaded, clips=clips, folder=tmp_path / "run")
    first.run()
    assert first.failed
    moved.write_bytes((SAMPLES / "square.mp4").read_bytes())
    again = begun(loaded, clips=clips, folder=tmp_path / "run", resume=True)
    again.run()
    assert not again.failed and again.document()["videos"] == {"wanted": 2, "evaluated": 2, "failed": 0}
    whole = begun(loaded, clips=clips)
    whole.run()
    assert again.document() == whole.document()


def test_names_that_are_no_text(loaded, tmp_path):
    """A file name with invalid bytes survives in samples, settings and results."""
    name = "caf\udce9.mp4"
    clips = [VideoQuestions(name, SAMPLES / "square.mp4", videos()[0].rows)]
    asked = replace(SETTINGS, data=name)
    first = begun(loaded, asked, clips, tmp_path / "run")
    first.run()
    first.folder.finish(first.document())
    again = begun(loaded, asked, clips, tmp_path / "run", resume=True)
    assert {s["video"] for s in again.samples} == {name} and results(tmp_path / "run")["settings"]["data"] == name


@pytest.mark.parametrize(("wanted", "processes", "each"), [("auto", 2, 3), (None, 4, 2), ("auto", 100, 1), (5, 4, 5)])
def test_several_processes_share_the_cores(wanted, processes, each, monkeypatch):
    """A host program with three threads, on a machine with eight cores."""
    monkeypatch.setattr("evoprune.backend.limits.Host.available_cores", lambda _: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert threads_of_each(wanted, processes) == each
