"""A whole run on the tiny model: what it finds, how it keeps its time, what it does without."""

import pytest

from evoprune.bench.tuning.full_answers import Answering
from evoprune.bench.tuning.run import Settings, Tuning
from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.session.engine import Engine
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from tests.quantized import parameters

CLIPS = ("samples/square.mp4", "samples/arrivals.webm")
QUESTIONS = ("What happens?", "Who is there?")


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


def tuned(saved, quantize="none", **changes):
    asked = {"videos": CLIPS, "questions": QUESTIONS, "budgets": (0.9, 0.2), "methods": ("random",)}
    settings = Settings(
        **asked | changes,
        model=ModelOptions(str(saved), dtype="fp32", quantize=quantize),
        sampling=SamplingOptions(frames=4),
    )
    tuning, said = Tuning(settings), []
    tuning.load()
    tuning.run(note=said.append)
    return tuning.document(), said


def test_a_run(saved):
    document, said = tuned(saved, agree=0.5)
    rows = {row["name"]: row for row in document["rows"]}
    assert len(rows) == 12 and all(row["videos"] == 2 for row in rows.values()) and not said and not document["notes"]
    assert document["videos"] == {"wanted": 2, "answered": 2, "failed": 0} and document["error"] is None
    assert {row["tokens"] for row in rows.values()} == {document["answer_tokens"]}
    near, far = rows["evoprune -b 0.9"], rows["evoprune -b 0.2"]
    assert 0 <= near["kl"] < far["kl"] and far["live_share"] < near["live_share"] < 1
    assert all(0 <= row["low"] <= row["agreement"] <= row["high"] <= 1 for row in rows.values())
    assert all(row["kl_p95"] >= row["kl"] / 2 and row["first_token"] > 0 for row in rows.values())
    assert document["recommended"] in {row["name"] for row in rows.values() if row["passes"]} or not any(
        row["passes"] for row in rows.values()
    )
    assert any(row["frontier"] for row in rows.values()) and rows[document["best"]]["low"] == max(
        row["low"] for row in rows.values()
    )


@pytest.mark.parametrize("kind", parameters("int8"))
@pytest.mark.parametrize("fits", [True, False])
def test_quantised_weights_are_compared_with_the_exact_ones(kind, fits, saved, monkeypatch):
    loaded = []

    def load(model, **options):
        loaded.append(model.quantize)
        if model.quantize == "none" and not fits:
            raise OutOfMemory("too little memory", "less", stage="load")
        return load_model(model, **options)

    monkeypatch.setattr("evoprune.bench.tuning.run.load_model", load)
    document, said = tuned(saved, kind, agree=0.5)
    rows = {row["name"]: row for row in document["rows"]}
    assert loaded == ["none", kind] and document["model"]["quantize"] == kind and len(rows) == 13
    alone = rows["none -b 1"]
    assert (alone["kl"] > 1e-7) == fits and alone["live_share"] == 1
    assert said == document["notes"] and (said == []) == fits


@pytest.mark.full
def test_questions_that_prove_too_little_are_named_at_once(saved):
    document, said = tuned(saved, agree=0.999, videos=CLIPS[:1])
    assert document["recommended"] is None and said == document["notes"]
    assert "cannot prove that 99.9% agree" in said[0]


@pytest.mark.full
def test_bad_videos_among_good_ones(saved, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(b"nothing")
    document, _ = tuned(saved, videos=(str(bad), CLIPS[0], "missing.mp4"), budgets=(0.5,), methods=())
    assert document["videos"] == {"wanted": 3, "answered": 1, "failed": 2}
    assert [found["video"] for found in document["failures"]] == [str(bad), "missing.mp4"]
    assert all(found["message"] for found in document["failures"]) and document["rows"]
    with pytest.raises(VideoError, match=r"bad\.mp4"):
        tuned(saved, videos=(str(bad), "missing.mp4"))


class Ticks:
    """A clock that goes on by itself: each look costs a second."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.mark.full
@pytest.mark.parametrize(("seconds", "tokens", "asked", "videos"), [(1e6, 64, 2, 2), (60, 64, 2, 2), (3, 8, 1, 1)])
def test_full_answers_keep_their_time(loaded, seconds, tokens, asked, videos):
    engine = Engine(loaded, PruneOptions().config())
    answering = Answering(engine, SamplingOptions(frames=4), QUESTIONS, seconds, Ticks())
    answering.answer(CLIPS)
    assert (answering.tokens, answering.asked, len(answering.made)) == (tokens, asked, videos)
    assert all(len(full.references) == answering.asked for full in answering.made)
    assert all(1 <= len(given.ids) <= answering.tokens for full in answering.made for given in full.references)


@pytest.mark.parametrize(
    "wrong", [{"agree": 1.0}, {"agree": 0.0}, {"time_limit_s": 0}, {"videos": ()}, {"questions": ()}]
)
def test_wrong_settings(wrong):
    with pytest.raises(UsageError):
        Settings(**{"videos": CLIPS} | wrong)


def test_nothing_to_try():
    with pytest.raises(UsageError, match="prunes anything"):
        Tuning(Settings(CLIPS, budgets=(1.0,)))
