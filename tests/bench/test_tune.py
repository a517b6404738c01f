"""A whole run on the tiny model: its results, its time limit, and how it copes with failures."""

from contextlib import suppress

import numpy as np
import pytest

from evoprune.bench import tune
from evoprune.bench.shared import TimeLimit
from evoprune.bench.tune import (
    MIN_CANDIDATES,
    Answering,
    Candidate,
    Known,
    Trial,
    TuneSettings,
    Tuning,
    bounds,
    candidates,
    design_effect,
    least_tokens,
    promising,
    provable,
    recommended,
    result_rows,
    search,
    smoothed,
)
from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.language import LanguageModel
from evoprune.session import (
    EncodedInputs,
    LoadedModel,
    ModelOptions,
    PruneOptions,
    Session,
    encoding,
    load_model,
)
from evoprune.video import SamplingOptions
from tests.quantized import parameters

CLIPS = ("samples/square.mp4", "samples/arrivals.webm")
QUESTIONS = ("What happens?", "Who is there?")


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


def tuned(saved, quantize="none", **changes):
    asked = {"videos": CLIPS, "questions": QUESTIONS, "budgets": (0.9, 0.2), "methods": ("random",)}
    settings = TuneSettings(
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
    assert (near["kept_share"], far["kept_share"]) == pytest.approx((0.9, 0.2), abs=0.03)
    assert 0 <= near["kl"] < far["kl"] and far["live_share"] < near["live_share"] < 1
    assert all(0 <= row["low"] <= row["agreement"] <= row["high"] <= 1 for row in rows.values())
    assert all(row["kl_p95"] >= row["kl"] / 2 and row["first_token"] > 0 for row in rows.values())
    assert document["recommended"] in {row["name"] for row in rows.values() if row["passes"]} or not any(
        row["passes"] for row in rows.values()
    )
    assert any(row["frontier"] for row in rows.values()) and rows[document["best"]]["low"] == max(
        row["low"] for row in rows.values()
    )


def test_the_time_to_the_first_token_holds_the_whole_prompt(loaded, monkeypatch):
    """Also unpruned, although its answers have read the prompt before. Columns stand for seconds."""
    read, along, prefill = [], EncodedInputs.read_along, LanguageModel.prefill
    monkeypatch.setattr(
        LanguageModel, "prefill", lambda *args, **options: read.append(len(args[1])) or prefill(*args, **options)
    )
    monkeypatch.setattr(EncodedInputs, "read_along", lambda *args: (along(*args)[0], read[-1]))
    session = Session(loaded, PruneOptions().config())
    answering = Answering(session, SamplingOptions(frames=4), QUESTIONS, TimeLimit(60, lambda: 0.0))
    answering.answer(CLIPS)
    for full in answering.made:
        first, second = full.references
        assert first.seconds > second.seconds > 0


def test_the_time_to_the_first_token_holds_the_encoding(saved, monkeypatch):
    def encode(*args, **more):
        video, seconds = real(*args, **more)
        return video, seconds + 1000

    real = tune.encode
    monkeypatch.setattr(tune, "encode", encode)
    document, _ = tuned(saved, videos=CLIPS[:1], budgets=(0.5,), methods=())
    assert all(1e6 < row[name] < 2e6 for row in document["rows"] for name in ("first_token_ms", "full_first_token_ms"))


@pytest.mark.full
@pytest.mark.parametrize("kind", parameters("int8"))
@pytest.mark.parametrize("fits", [True, False])
def test_quantised_weights_are_compared_with_the_exact_ones(kind, fits, saved, monkeypatch):
    loaded = []

    def load(model, **options):
        loaded.append(model.options.quantize)
        if model.options.quantize == "none" and not fits:
            raise OutOfMemory("too little memory", "less", stage="load")
        return load_model(model, **options)

    monkeypatch.setattr("evoprune.bench.tune.load_model", load)
    document, said = tuned(saved, kind, agree=0.5)
    rows = {row["name"]: row for row in document["rows"]}
    assert loaded == ["none", kind] and document["model"]["quantize"] == kind and len(rows) == 13
    alone = rows["none -b 1"]
    assert (alone["kl"] > 1e-7) == fits and alone["live_share"] == 1
    assert said == document["notes"] and (said == []) == fits


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
    """A clock that advances by a second each time it is read."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        self.seconds += 1
        return self.seconds


@pytest.mark.full
@pytest.mark.parametrize(("seconds", "tokens", "asked", "videos"), [(1e6, 64, 2, 2), (60, 64, 2, 2), (3, 8, 1, 1)])
def test_full_answers_keep_their_time(loaded, seconds, tokens, asked, videos):
    session = Session(loaded, PruneOptions().config())
    answering = Answering(session, SamplingOptions(frames=4), QUESTIONS, TimeLimit(seconds, Ticks()))
    answering.answer(CLIPS)
    assert (answering.tokens, answering.asked, len(answering.made)) == (tokens, asked, videos)
    assert all(len(full.references) == answering.asked for full in answering.made)
    assert all(1 <= len(given.ids) <= answering.tokens for full in answering.made for given in full.references)


@pytest.mark.parametrize(
    "wrong", [{"agree": 1.0}, {"agree": 0.0}, {"time_limit_s": 0}, {"videos": ()}, {"questions": ()}]
)
def test_wrong_settings(wrong):
    with pytest.raises(UsageError):
        TuneSettings(**{"videos": CLIPS} | wrong)


def test_nothing_to_try():
    with pytest.raises(UsageError, match="prunes anything"):
        Tuning(TuneSettings(CLIPS, budgets=(1.0,)))


class World:
    """Candidates with known agreement and speed; each trial takes time on a simulated clock."""

    def __init__(self, count: int, limit: float, cost: float = 1.0):
        self.spent, self.limit, self.cost = 0.0, limit, cost
        self.known = {Candidate(f"m{i}", 0.5): [] for i in range(count)}
        self.tried = []

    def trial(self, candidate: Candidate, video: int) -> Trial:
        number = int(candidate.method[1:])
        self.spent += self.cost
        return Trial(
            100 - number, 100, [], 1 / (1 + number), 2.0, self.cost, 1.0, 1.0
        )  # later candidates are faster and less accurate

    def run(self, videos: int, goal: float) -> dict[str, int]:
        """Run the search and return the number of videos tried per candidate."""
        left = lambda: self.limit - self.spent  # noqa: E731
        self.tried = list(search(self.known, videos, goal, self.trial, left, lambda video: self.cost))
        assert self.spent <= self.limit and len(self.tried) == len(set(self.tried))
        return {candidate.method: len(trials) for candidate, trials in self.known.items()}


@pytest.mark.parametrize("limit", [4, 18, 45, 89, 90])
def test_the_time_goes_to_the_fastest_that_reach_the_goal(limit):
    found = World(9, limit).run(10, goal=0.955)
    if limit in (4, 90):  # too little for a first round; enough for everything
        assert sum(found.values()) == limit
        return
    assert all(count >= 2 for count in found.values())
    # m4 is the fastest that agrees often enough, m0 the slowest; m8 agrees least.
    assert found["m4"] == max(found.values()) > found["m8"] or limit == 18
    if limit >= 2 * 9 + 8 * MIN_CANDIDATES:
        assert found["m4"] == 10


def uneven(costs: list[float], limit: float, count: int, stop: int | None = None) -> Known:
    """Search with trials that take longer on some videos, and are interrupted by the trial with the number `stop`."""
    known: Known = {Candidate(f"m{i}", 0.5): [] for i in range(count)}
    spent = []

    def trial(candidate: Candidate, video: int) -> Trial:
        if len(spent) == stop:
            raise KeyboardInterrupt
        spent.append(costs[video])
        return Trial(100 - int(candidate.method[1:]), 100, [0.1] * 100, 1.0, 2.0, costs[video], 0.5, 0.5)

    with suppress(KeyboardInterrupt):
        for _ in search(known, len(costs), 0.9, trial, lambda: limit - sum(spent), costs.__getitem__):
            pass
    return known


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("costs", [[6, 1], [1, 6, 1], [1, 1, 3, 1, 2, 9, 1, 1]])
def test_settings_with_the_same_number_of_videos_were_tried_on_the_same_ones(costs, count):
    interrupted = [uneven(costs, 1000, count, stop) for stop in range(count * len(costs))]
    for known in [*(uneven(costs, limit, count) for limit in range(0, 60)), *interrupted]:
        videos = {tuple(trial.video for trial in trials) for trials in known.values()}
        assert all(a == b[: len(a)] for a, b in zip(sorted(videos, key=len), sorted(videos, key=len)[1:], strict=False))
        rows = result_rows(known, 0.9)
        assert len({row["videos"] for row in rows if row["frontier"]}) <= 1
        numbers = [len(trials) for trials in known.values()]
        assert all(
            sum(number > video for number in numbers) > 1 for video in range(1, max(numbers))
        )  # something to compare


def test_the_first_video_is_left_out_if_all_settings_fit_on_another():
    assert {tuple(trial.video for trial in trials) for trials in uneven([6, 1], 10, 2).values()} == {(1,)}
    assert {tuple(trial.video for trial in trials) for trials in uneven([6, 6, 1], 10, 2).values()} == {(2,)}
    assert [len(trials) for trials in uneven([6, 6], 10, 2).values()] == [1, 0]


def test_candidates():
    found = candidates()
    assert len(found) >= 24 and len(set(found)) == len(found) and all(made.budget < 1 for made in found)
    assert {made.method for made in candidates((1.0, 0.2), ["divprune", "none"])} == {
        *(made.method for made in found), "divprune"
    }  # fmt: skip
    assert {made.budget for made in candidates((1.0, 0.2))} == {0.2}
    assert [made.budget for made in candidates((0.1, 0.5))][:2] == [0.5, 0.1]
    assert Candidate("evoprune:depth=0.5", 0.25).name == "evoprune:depth=0.5 -b 0.25"


def row(method: str, first_token: float, passes: bool = True, videos: int = 2) -> dict:
    return {"method": method, "first_token": first_token, "passes": passes, "videos": videos}


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([row("evoprune:floor=1", 0.200), row("evoprune", 0.209)], "evoprune"),  # equally fast, and simpler
        ([row("evoprune:floor=1", 0.200), row("evoprune", 0.211)], "evoprune:floor=1"),
        ([row("evoprune:floor=1", 0.200), row("tome", 0.206), row("evoprune", 0.203)], "evoprune"),
        ([row("evoprune", 0.1, False), row("evoprune:depth=0.5", 0.2)], "evoprune:depth=0.5"),
        ([row("evoprune", 0.1, videos=2), row("tome", 0.2, videos=8)], "tome"),  # on other videos
        ([row("evoprune", 0.1), row("tome", 0.2, False, videos=8)], "evoprune"),
        ([row("evoprune", 0.1, False)], None),
        ([], None),
    ],
)
def test_the_fastest_that_passes(rows, chosen):
    found = recommended(rows)
    assert (found and found["method"]) == chosen


def test_settings_that_do_the_same_work_share_their_times():
    def trials(first_s: list[float], live: float) -> list[Trial]:
        return [Trial(9, 10, [0.1] * 10, first, 1.0, 1.0, 0.1, live) for first in first_s]

    known = {
        Candidate("evoprune", 0.1): trials([0.30, 0.40], 0.2),
        Candidate("evoprune:floor=1", 0.1): trials([0.10, 0.20], 0.2),
        Candidate("evoprune:depth=0.5", 0.1): trials([0.15, 0.15], 0.5),
    }
    found = {row["name"]: row for row in result_rows(known, 0.9)}
    rows = {name: row["first_token"] for name, row in found.items()}
    assert rows["evoprune -b 0.1"] == rows["evoprune:floor=1 -b 0.1"] == pytest.approx(0.25)
    assert rows["evoprune:depth=0.5 -b 0.1"] == pytest.approx(0.15)
    slow = found["evoprune -b 0.1"]  # absolute times are its own
    assert (slow["first_token_ms"], slow["full_first_token_ms"]) == pytest.approx((350, 1000))
    # All reach the goal, but none provably.
    assert promising(known, 0.9)[-1].name == slow["name"] and not any(row["passes"] for row in found.values())
    assert [row["frontier"] for row in found.values()] == [True, False, False]


def answers(random, shares, videos=16, tokens=60, alike=0.2):
    """Draw, for candidates with these true agreements, the agreeing tokens and all tokens per video."""
    spread = (1 - alike) / alike
    each = [random.beta(share * spread, (1 - share) * spread, videos) for share in shares]
    return [(random.binomial(tokens, share).astype(float), np.full(videos, float(tokens))) for share in each]


def test_lower_bounds_cover_the_truth():
    random, shares, below = np.random.default_rng(0), (0.995, 0.98, 0.95, 0.9, 0.7), []
    for _ in range(400):
        found = answers(random, shares)
        effect = design_effect(found)
        lows = [bounds(agree.sum() / 960, 960, 16, effect)[0] for agree, _ in found]
        below.append([low <= share for low, share in zip(lows, shares, strict=True)])
    assert (np.mean(below, 0) >= 0.95).all()


def test_no_number_of_agreeing_tokens_proves_everything():
    assert bounds(1.0, 100, 10, 1.0)[0] == pytest.approx(0.963, abs=1e-3)
    assert bounds(1.0, 100, 10, 4.0)[0] < 0.9
    assert bounds(1.0, 100, 10, None) == bounds(1.0, 10, 10, 1.0)
    assert bounds(1.0, 1, 1, None)[0] < 0.25 and bounds(0.0, 5, 2, 1.0)[0] == 0.0


def test_the_design_effect():
    random = np.random.default_rng(1)
    independent = design_effect(answers(random, [0.8] * 40, alike=1e-6))
    alike = design_effect(answers(random, [0.8] * 40, alike=0.3))
    assert 1 <= independent < 1.2 and alike == pytest.approx(1 + 59 * 0.3, rel=0.15)
    never = (np.full(4, 9.0), np.full(4, 9.0))
    assert design_effect([never]) is None and design_effect([(np.ones(1), np.full(1, 2.0))]) is None
    assert design_effect([never, *answers(random, [0.8], videos=4)]) >= 1


@pytest.mark.parametrize(
    ("clips", "says"), [(CLIPS, "all settings agree on all tokens"), (CLIPS[:1], "cannot prove that 90%")]
)
def test_a_note_says_why_nothing_passes_though_all_agree(saved, monkeypatch, clips, says):
    monkeypatch.setattr("evoprune.bench.tune.design_effect", lambda candidates: None)
    document, said = tuned(saved, videos=clips, agree=0.9, budgets=(0.9999,), methods=())
    assert not any(row["passes"] for row in document["rows"]) and {row["observed"] for row in document["rows"]} == {1.0}
    assert says in " ".join([*said, *document["notes"]])


def test_a_note_names_the_videos_on_which_settings_were_compared(saved, monkeypatch):
    left = iter([1e9, 1e9, *[1e9] * 8])  # seconds; too few for the second video
    search = tune.search
    monkeypatch.setattr(tune, "search", lambda *given: search(*given[:4], lambda: next(left, 0.0), given[5]))
    document, _ = tuned(saved, budgets=(0.2,))
    assert {row["videos"] for row in document["rows"]} == {1} and len(document["rows"]) == 6
    assert document["compared"] == {"settings": 6, "videos": [CLIPS[0]]}
    notes = " ".join(document["notes"])
    assert "6 of 6 settings were not tried on every video, and 0 on none; 6 settings compared on square.mp4" in notes


@pytest.mark.parametrize("agree", [0.5, 0.9, 0.98, 0.999])
def test_the_least_tokens_are_just_enough(agree):
    least = least_tokens(agree)
    assert provable(least) >= agree > provable(least - 1)
    assert bounds(1.0, least, 9, 1.0)[0] == pytest.approx(provable(least))


def test_agreement_does_not_rise_with_kl():
    agree, tokens, kl = np.array([90, 96, 80, 48]), np.array([100, 100, 100, 50]), np.array([0.1, 0.2, 0.9, 0.5])
    # In order of KL: 0.9, 0.96, 0.96 and 0.8. The first three are pooled.
    assert smoothed(agree, tokens, kl).tolist() == pytest.approx([0.936, 0.936, 0.8, 0.936])
    steady = np.array([9, 8, 7])
    assert smoothed(steady, np.full(3, 10), np.array([0.0, 0.1, 0.2])).tolist() == pytest.approx([0.9, 0.8, 0.7])
    random = np.random.default_rng(2)
    found = smoothed(random.integers(0, 100, 30), np.full(30, 100), np.arange(30))
    assert (np.diff(found) <= 1e-12).all()


@pytest.mark.full
@pytest.mark.parametrize("idle", [0, 2])
def test_each_video_is_read_once_for_all_candidates(saved, monkeypatch, idle):
    """Reads ahead only if that takes no core away from the measurement."""
    read, real = [], encoding.read_chunks

    def counted(info, times_s, **how):
        read.append(info.path)
        return real(info, times_s, **how)

    monkeypatch.setattr(encoding, "read_chunks", counted)
    monkeypatch.setattr(LoadedModel, "idle_cores", idle)
    videos = ("samples/square.mp4", "samples/gone.mp4", "samples/three.mp4")
    asked = {"videos": videos, "questions": QUESTIONS, "budgets": (0.5, 0.25), "methods": ("random",)}
    run = Tuning(TuneSettings(**asked, model=ModelOptions(str(saved)), sampling=SamplingOptions(frames=4)))
    run.load()
    run.loaded.patches.limit_bytes = 300_000  # room for one video that is not in use
    run.run()
    assert read == [videos[0], videos[2]]
    assert run.document()["videos"] == {"wanted": 3, "answered": 2, "failed": 1}


def test_full_answers_have_a_share_of_the_time_that_loading_left(loaded, monkeypatch):
    now = [0.0]
    tuning = Tuning(TuneSettings(CLIPS, time_limit_s=600), now=lambda: now[0])
    tuning.loaded = loaded
    limits = []

    class Known(Answering):
        def answer(self, videos, progress=None):
            limits.append(self._limit.left)

    monkeypatch.setattr(tune, "Answering", Known)
    now[0] = 450.0
    tuning.answer(lambda *what: None)
    assert limits == [pytest.approx(50.0)]
