import pytest

from tests.video import mutations
from tests.video.mutations import MUTATIONS, SOURCES, mutant, run_all, sources, table


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    return sources(tmp_path_factory.mktemp("sources"))


@pytest.mark.full
def test_a_case_is_always_the_same_and_no_other(originals):
    made = [mutant(number, 5, originals) for number in range(200)]
    assert made == [mutant(number, 5, originals) for number in range(200)]
    assert len({content for _, content in made}) > 190
    assert {name.partition(":")[0] for name, _ in made} == set(SOURCES)
    assert all(any(mutation.__name__ in name for name, _ in made) for mutation in MUTATIONS)


@pytest.mark.full
def test_what_must_not_be_is_noticed(tmp_path, monkeypatch):
    """A case that fails, one that takes long, one that takes much memory: each keeps its file."""
    problems = iter([(1, "ZeroDivisionError", 0.1, 0), (0, "answered", 99.0, 0), (0, "answered", 99.0, 0)])
    monkeypatch.setattr(mutations, "timed", lambda *_: next(problems, (3, "not a video", 0.1, 2**40)))
    outcomes = list(run_all(range(3), 0, tmp_path))
    assert [o.bad for o in outcomes] == ["ZeroDivisionError", "it took 99 s", "it took 1048576 MiB"]
    assert {path.name.partition("_")[0] for path in tmp_path.iterdir()} == {"0", "1", "2", "sources"}
    lines = table(outcomes).splitlines()
    assert len(lines) == 5 and lines[2].startswith("| 0 | answered | 1 | 99.0 s |")


def check(numbers, seed, folder):
    outcomes = list(run_all(numbers, seed, folder))
    assert not [outcome for outcome in outcomes if outcome.bad], table(outcomes)
    return outcomes


def test_broken_videos_are_answered_or_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mutations, "COMMAND_EVERY", 1000)
    outcomes = check(range(4 * len(SOURCES)), 77, tmp_path)
    assert {outcome.code for outcome in outcomes} == {0, 3}
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


@pytest.mark.slow
def test_a_thousand_broken_videos(tmp_path):
    assert len(check(range(1000), 0, tmp_path)) == 1000
