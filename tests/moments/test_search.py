"""Find moments with the demo models in videos of a few minutes, with known objects and times."""

import gc

import numpy as np
import pytest
from PIL import Image

import evoprune
from evoprune.errors import UsageError, VideoError
from evoprune.moments.search import Search, first_tokens, questions_for
from evoprune.session import FindOptions
from evoprune.video import SamplingOptions
from tests.moments.long_videos import write_long_video
from tests.threads import one_thread  # noqa: F401
from tests.video.files import numbered_frames, write_video


def overlaps(moment, span) -> bool:
    return min(moment.end_s, span[1]) > max(moment.start_s, span[0])


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "long.mp4"
    return path, write_long_video(path, "shapes", 1.5)


@pytest.fixture(scope="module")
def demo():
    return evoprune.VideoQA.load("demo", budget=0.25)


def there_and_absent(times):
    """Return the names of objects with exactly one moment that lasts over two seconds, and of objects that never appear."""
    absent = [name for name, spans in times.items() if not spans]
    lasting = [name for name, spans in times.items() if len(spans) == 1 and spans[0][1] - spans[0][0] > 2]
    return lasting, absent


@pytest.mark.full
def test_things_that_are_there_are_found_and_others_are_not(demo, shapes):
    path, times = shapes
    lasting, absent = there_and_absent(times)
    lasting = lasting[:5]
    absent = absent[:5]
    seen = []
    found = demo.find(path, [*lasting, *absent], progress=lambda *step: seen.append(step))
    assert len({moment.query for moment in found if moment.query in absent}) <= 1  # the model is not always right
    right = [m for m in found if m.query in lasting and overlaps(m, *times[m.query])]
    assert len({moment.query for moment in right}) >= len(lasting) - 1
    errors = [abs(m.start_s - times[m.query][0][0]) + abs(m.end_s - times[m.query][0][1]) for m in right]
    assert sorted(errors)[len(errors) // 2] < 2.0
    assert all(0.96 <= m.score <= 1 and m.start_s <= m.best_s <= m.end_s for m in found)
    segments = [step for step in seen if step[0] == "segment"]
    assert segments == [("segment", n + 1, 12) for n in range(12)] and seen[-1][0] == "moment"


@pytest.mark.full
def test_borders_of_long_segments_are_found_by_shorter_and_shorter_parts(demo, shapes):
    path, times = shapes
    lasting, _ = there_and_absent(times)
    found = demo.find(path, lasting[:6], total_tokens=12 * 96, min_score=0.9)
    right = [m for m in found if overlaps(m, *times[m.query])]
    errors = [abs(m.start_s - times[m.query][0][0]) for m in right]
    assert len(right) >= 2 and sorted(errors)[len(errors) // 2] < 1.5


@pytest.mark.full
def test_the_other_world(tmp_path):
    path = tmp_path / "long.mp4"
    times = write_long_video(path, "scenes", 1.3)
    lasting, absent = there_and_absent(times)
    qa = evoprune.VideoQA.load("demo-scenes", budget=0.25)
    found = qa.find(path, [*lasting[:6], *absent[:4]])
    right = {m.query for m in found if m.query in lasting and overlaps(m, *times[m.query])}
    assert len(right) >= len(lasting[:6]) / 2
    assert len([m for m in found if m.query in absent]) <= 1


@pytest.mark.full
def test_what_broke_off_has_moments_of_what_was_read(demo, shapes):
    path, times = shapes
    there = [name for name, spans in times.items() if spans and spans[0][1] < 40][:6]

    def stop(stage, done, total):
        if done == 6:
            raise KeyboardInterrupt

    with Search(demo.session, str(path), there, FindOptions(), SamplingOptions()) as search:
        with pytest.raises(KeyboardInterrupt):
            search.run(stop)
        moments = search.moments()
        assert moments and max(moment.end_s for moment in moments) <= search.segments[5].end_s


@pytest.mark.full
def test_top_min_score_and_a_part_of_the_time(demo, shapes):
    path, _ = shapes
    everything = demo.find(path, "a red circle", min_score=0.0, end_s=30.0, segment_s=10.0)
    assert len(everything) == 1 and everything[0].end_s == 30.0
    assert demo.find(path, "a red circle", min_score=1.0) == []
    assert len(demo.find(path, ["a red circle"], min_score=0.001, top=1)) <= 1


def test_queries_become_the_questions_that_a_demo_knows(demo):
    ask = lambda query, **options: questions_for(demo.session, FindOptions(**options), query)  # noqa: E731
    assert ask("a red circle") == ask("red circle") == (("Is there a red circle?", True),)
    assert ask("Can you see a red ring?") == (("Can you see a red ring?", True),)
    assert ask("a red {} ring", prompt="Can you see {}?") == (("Can you see a red {} ring?", True),)
    at_start, at_end = "Is the red ring there at the start?", "Is the red ring there at the end?"
    assert ask("the red ring appears") == (("Is there a red ring?", True), (at_start, False), (at_end, True))
    assert ask("a red ring vanishes")[1:] == ((at_start, True), (at_end, False))


def test_words_for_yes_and_no(demo):
    tokenizer = demo.session.loaded.tokenizer
    yes, no = first_tokens(tokenizer, "yes", "no")
    assert tokenizer.encode("yes")[0] in yes and tokenizer.encode("no")[0] in no and not set(yes) & set(no)
    with pytest.raises(UsageError, match="begin with the same token"):
        first_tokens(tokenizer, "yes", "Yes")


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (("a", ""), "query is empty"),
        (("a", []), "no query"),
        (("a", [3]), "query is 3, not a string"),
        (("a", ["x", "x"]), "appears twice"),
        ((["a", "b"], "x"), "find takes one video"),
    ],
)
def test_what_makes_no_sense_is_refused(demo, given, problem):
    with pytest.raises(UsageError, match=problem):
        demo.find(*given)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"top": 0}, "top is 0"),
        ({"total_tokens": 0}, "total_tokens is 0"),
        ({"min_score": 1.5}, "min_score is 1.5"),
        ({"segment_s": 0.0}, "segment_s is 0"),
        ({"prompt": "What?"}, "without {} for the query"),
        ({"yes": " "}, "is empty"),
    ],
)
def test_options_out_of_range(options, problem):
    with pytest.raises(UsageError, match=problem):
        FindOptions(**options)


def test_a_picture_a_missing_file_and_a_query_of_many_pages(demo, shapes, tmp_path):
    path, _ = shapes
    picture = tmp_path / "still.png"
    Image.new("RGB", (168, 112)).save(picture)
    with pytest.raises(VideoError, match="is an image, which has no moments"):
        demo.find(picture, "a red circle")
    with pytest.raises(VideoError, match="no such file"):
        demo.find("gone.mp4", "a red circle")
    with pytest.raises(UsageError, match=r"do not fit|does not fit"):
        demo.find(path, "red " * 100_000)


def test_one_frame(demo, tmp_path):
    """A video of a single frame has one segment."""
    path = write_video(tmp_path / "one.mp4", np.zeros((1, 112, 168, 3), np.uint8), fps=10)
    with Search(demo.session, str(path), ["a red circle"], FindOptions(), SamplingOptions()) as search:
        search.run()
        assert len(search.segments) == 1 and search.moments() == []


def test_a_moment_ends_with_its_last_segment(demo, shapes):
    path, _ = shapes
    with Search(demo.session, str(path), ["a red circle"], FindOptions(), SamplingOptions()) as search:
        search._scores["a red circle"] = [-5.0, 4.0, 3.0, 3.5, *[-5.0] * 8]
        (moment,) = search.moments()
    assert (moment.start_s, moment.end_s) == (search.segments[1].start_s, search.segments[3].end_s)


@pytest.mark.full
def test_memory_does_not_grow_with_the_length(demo, shapes):
    """A segment is released before the next but one is encoded."""
    path, _ = shapes
    held = []
    encoded_inputs = evoprune.EncodedInputs  # looked up once, because there are about a million objects

    def count(stage, done, total):
        held.append(sum(type(each) is encoded_inputs for each in gc.get_objects()))

    demo.find(path, "a red circle", min_score=1.0, progress=count)
    assert len(held) == 12 and max(held) <= held[0] + 1


class Known:
    """Replacement for a part of a video that is read."""

    def __init__(self, part):
        self.part = part

    def begin(self):
        pass

    def close(self):
        pass


@pytest.fixture
def searched(demo, monkeypatch, tmp_path):
    """A function that searches a video of 19.5 minutes, whose parts show the query in the given spans of time."""
    path = write_video(tmp_path / "long.mp4", numbered_frames(40, 56, 56), pts=[30.0 * n for n in range(40)], gop=1)

    def run(spans, **options):
        monkeypatch.setattr(Search, "_open", lambda self, part, seek: Known(part))

        def odds(part):
            return 6.0 if any(part.start_s < end_s and part.end_s > start_s for start_s, end_s in spans) else -6.0

        monkeypatch.setattr(Search, "_ask", lambda self, opened, queries: dict.fromkeys(queries, odds(opened.part)))
        with Search(demo.session, str(path), ["a red ring"], FindOptions(**options), SamplingOptions()) as search:
            search.run()
        return search

    return run


SPANS = [(60.0 * n + 28.0, 60.0 * n + 34.0) for n in range(18)]


@pytest.mark.parametrize("segment_s", [None, 30.0, 60.0])
def test_moments_a_minute_apart_are_not_joined(segment_s, searched):
    """This holds for any segment length, although consecutive segments show the query."""
    search = searched(SPANS, segment_s=segment_s, top=20)
    found = sorted(search.moments(), key=lambda moment: moment.start_s)
    assert len(found) == 18 and search.more("a red ring") == 0
    for moment, (start_s, end_s) in zip(found, SPANS, strict=True):
        assert (moment.start_s, moment.end_s) == pytest.approx((start_s, end_s), abs=2.0)
        assert moment.score > 0.99 and moment.start_s <= moment.best_s <= moment.end_s


@pytest.mark.parametrize("top", [1, 10, 17])
def test_moments_that_are_left_out_are_counted(top, searched):
    search = searched(SPANS, top=top)
    assert len(search.moments()) == top and search.more("a red ring") == 18 - top


def test_what_goes_away_for_a_moment_is_one(searched):
    (moment,) = searched([(20.0, 27.0), (32.0, 50.0)]).moments()
    assert (moment.start_s, moment.end_s) == pytest.approx((20.0, 50.0), abs=1.0)
    (moment,) = searched([(16.0, 900.0)]).moments()
    assert (moment.start_s, moment.end_s) == pytest.approx((16.0, 900.0), abs=1.0)
