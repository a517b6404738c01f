"""A run of `tune --operations`: its recipe is the one that the method then uses."""

import pytest

from evoprune import methods
from evoprune.bench.agreement import Reference
from evoprune.bench.tune import TuneSettings
from evoprune.bench.tune_operations import OperationTuning
from evoprune.report import rounded
from evoprune.session import ModelOptions
from evoprune.video import SamplingOptions
from evoprune.video_qa import VideoQA
from evoprune_cli.terminal import json_line

CLIPS, QUESTION = ("samples/square.mp4", "samples/arrivals.webm"), "What happens?"


@pytest.fixture(scope="module")
def run(saved):
    settings = TuneSettings(
        CLIPS, (QUESTION,), model=ModelOptions(str(saved), dtype="fp32"), sampling=SamplingOptions(frames=4)
    )
    tuning = OperationTuning(settings)
    tuning.load()
    tuning.run()
    return tuning


@pytest.mark.full
def test_what_a_run_finds_is_used(run, tmp_path):
    document = run.document()
    assert document["complete"] and document["videos"] == {"wanted": 2, "answered": 2, "failed": 0}
    assert [row["budget"] for row in document["rows"]] == [0.5, 0.35, 0.25, 0.15, 0.1]
    assert all(row["share"] <= row["budget"] and row["kl"] >= 0 <= row["agree"] for row in document["rows"])
    path = tmp_path / "recipe.json"
    path.write_text(json_line(rounded({"schema": run.schema} | document)))
    assert methods.get(f"operations:recipe={path}").recipe == run.search.recipe
    full = VideoQA(run.loaded, budget=1.0, method="none")
    losses = []
    for clip in CLIPS:  # the measured loss is the method's loss
        video = full.encode(clip, frames=4)
        answer = video.ask(QUESTION, max_new_tokens=64)
        assert answer.text is not None
        given = Reference.of(video, QUESTION, answer.ids, answer.report.finish_reason == "stop")
        pruned = VideoQA(run.loaded, budget=0.15, method=f"operations:recipe={path}").encode(clip, frames=4)
        losses += given.agreement(pruned).kl.tolist()
    row = next(row for row in document["rows"] if row["budget"] == 0.15)
    assert sum(losses) / len(losses) == pytest.approx(row["kl"], abs=1e-5)


def test_too_little_time_finds_nothing(saved):
    ticks = iter(range(10_000))
    settings = TuneSettings(
        CLIPS[:1], (QUESTION,), time_limit_s=1.0, model=ModelOptions(str(saved), dtype="fp32"),
        sampling=SamplingOptions(frames=4),
    )  # fmt: skip
    tuning, said = OperationTuning(settings, lambda: float(next(ticks))), []
    tuning.load()
    tuning.run(note=said.append)
    assert not tuning.search.complete and tuning.document()["rows"] == []
    assert "so the operations were not ordered" in said[0]
