"""Cached segments: another query reads nothing, and one hash of the file serves all segments."""

from dataclasses import replace

import pytest

import evoprune
from evoprune.errors import UsageError
from evoprune.moments.search import Search
from evoprune.session import Cache, FindOptions, encoding
from evoprune.session import cache as cache_module
from evoprune.video import SamplingOptions
from tests.cli.conftest import ROOT
from tests.threads import one_thread  # noqa: F401

SQUARE = str(ROOT / "samples" / "square.mp4")
SHORT = FindOptions(segment_s=2.0, min_score=1.0)  # three segments, not searched in parts


@pytest.fixture(scope="module")
def demo():
    return evoprune.VideoQA.load("demo", budget=0.25)


def scores(qa, query, cache=None):
    with Search(qa.session, SQUARE, [query], SHORT, SamplingOptions(), cache) as search:
        search.run()
        return search._scores[query]


def test_another_query_reads_and_encodes_nothing(demo, tmp_path, monkeypatch):
    plain = [scores(demo, query) for query in ("a green square", "a red ring")]
    hashed = []
    monkeypatch.setattr(cache_module, "content_hash", lambda path: hashed.append(path) or "the same")
    cache = Cache(tmp_path / "kept").of_segments
    assert scores(demo, "a green square", cache) == plain[0] and len(hashed) == 1
    assert cache.size()[0] == 3

    def refused(*args, **how):
        raise AssertionError("it is read")

    monkeypatch.setattr(encoding, "read_chunks", refused)
    assert scores(demo, "a red ring", cache) == plain[1] and len(hashed) == 1
    assert cache.size()[0] == 3


def test_moments_are_the_same_with_a_cache(demo, tmp_path):
    plain = demo.find(SQUARE, "a green square", segment_s=2.0)
    cache = evoprune.Cache(tmp_path)
    assert plain and [demo.find(SQUARE, "a green square", segment_s=2.0, cache=cache) for _ in range(2)] == [
        plain,
        plain,
    ]
    assert cache.of_segments.size()[0] >= 3 and cache.size()[0] == 0
    with pytest.raises(UsageError, match="not a Cache"):
        demo.find(SQUARE, "a green square", cache=str(tmp_path))


def test_room_is_made_once_at_the_end(demo, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(type(Cache().of_segments), "make_room", lambda self: made.append(self.size()[0]))
    scores(demo, "a green square", Cache(tmp_path).of_segments)
    assert made == [3]


def test_a_limit_of_its_own(demo, tmp_path):
    one = Cache(tmp_path / "one").of_segments
    scores(demo, "a green square", one)
    entries, occupied = one.size()
    limit = occupied * 2 // entries
    few = replace(Cache(tmp_path / "few").of_segments, limit_bytes=limit + limit // 4)
    scores(demo, "a green square", few)
    assert few.size()[0] == 2


def test_a_method_that_reads_the_question_keeps_nothing(demo, tmp_path):
    qa = evoprune.VideoQA(demo.loaded, budget=0.25, method="cdpruner")
    cache = Cache(tmp_path).of_segments
    assert qa.session.pruning.method.reads_question
    assert scores(qa, "a green square", cache) == scores(qa, "a green square") and cache.size()[0] == 0
