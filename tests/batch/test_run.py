"""Test batches of questions: which rows remain, and that every row gets a record, whatever happens to the other rows."""

import pkgutil
import threading
import time
from contextlib import closing
from dataclasses import asdict, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.batch.output import EarlierRecord, Settings, Sources
from evoprune.batch.rows import Row, RowReader, Span
from evoprune.batch.run import answers
from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.language import Turn
from evoprune.report import Report
from evoprune.video import read_chunks
from evoprune.video_qa import VideoQA
from tests.threads import check_ended

CLIPS = ["samples/square.mp4", "samples/three.mp4", "samples/vanish.webm"]
QUESTIONS = ["What happens?", "How many red squares are there in the video?"]
ROWS = RowReader().pairs(CLIPS, QUESTIONS)
SETTINGS = Settings.of()


def changed(settings: Settings = SETTINGS, **options) -> Settings:
    """Return the same settings with some options changed."""
    return Settings.of(
        **vars(settings.model)
        | asdict(settings.pruning)
        | vars(settings.sampling)
        | vars(settings.generation)
        | options
    )


def found(row: Row, failed: bool = False, settings: Settings = SETTINGS, **other) -> EarlierRecord:
    """Return the row as it is read back from a file."""
    error = {"message": "no"} if failed else None
    batch = {"row": row.asked | {"answer": row.answer} | other, "settings": settings.record()}
    back = Report.from_json(Report(id=row.id, error=error, batch=batch).to_json())
    return EarlierRecord(back.id, back.batch["row"], back.batch["settings"], failed, 0, 0)


@settings(deadline=None)
@given(st.lists(st.sampled_from([None, True, False]), min_size=6, max_size=6), st.floats(0, 1e4), st.floats(1e-4, 1))
def test_what_has_no_answer_is_left(states, start, budget):
    settings = changed(budget=budget)
    rows = [replace(row, start_s=start, options=("a", "b"), answer=3) for row in ROWS]
    before = [found(row, state, settings) for row, state in zip(rows, states, strict=True) if state is not None]
    left = [row for row, state in zip(rows, states, strict=True) if state is not False]
    assert Sources(settings).remaining(rows, before) == left
    others = [row for row in left if row is not rows[0]]
    assert Sources(settings).remaining(rows[1:], before) == others


@pytest.mark.parametrize("failed", [True, False])
def test_other_settings_are_refused(failed):
    before = [found(ROWS[0], failed)]
    others = {
        "model": "other", "revision": "other", "dtype": "fp16", "quantize": "int8", "load_format": "dummy", "budget": 0.125,
        "method": "pool", "seed": 1, "fps": 1.0, "frames": 4, "max_frames": 4,
        "max_visual_tokens": 9, "decoder": "decord", "seek": "exact", "max_new_tokens": 1, "temperature": 0.5, "top_p": 0.5,
        "system": "other",
    }  # fmt: skip
    assert {*others, "method_args"} == {*SETTINGS.record()}
    assert changed(device="cpu", threads=2, offline=True).record() == SETTINGS.record()  # the same answers
    for name, value in others.items():
        other = changed(**{name: value})
        with pytest.raises(UsageError, match=f"other settings: {name} was .* and is now ") as caught:
            Sources(other).remaining(ROWS, before)
        assert caught.value.hint


@pytest.mark.parametrize("name", ["video", "question", "start_s", "end_s", "options"])
def test_a_row_that_changed_is_refused(name):
    value = ("a", "b") if name == "options" else 3.0 if "_s" in name else ("x",) if name == "video" else "x"
    rows = [replace(ROWS[0], **{"inputs" if name == "video" else name: value}), *ROWS[1:]]
    with pytest.raises(UsageError, match=f"has changed since it was asked: {name} was "):
        Sources(SETTINGS).remaining(rows, [found(ROWS[0])])
    assert Sources(SETTINGS).remaining([replace(ROWS[0], answer="yes")], [found(ROWS[0])]) == []  # never asked


def test_a_row_that_failed_may_be_corrected():
    rows = [replace(ROWS[0], inputs=("right.mp4",), paths=("right.mp4",)), *ROWS[1:]]
    assert Sources(SETTINGS).remaining(rows, [found(ROWS[0], failed=True), found(ROWS[1])]) == [rows[0], *ROWS[2:]]


def test_another_commit_of_a_hub_model_is_refused():
    """The commit is known from an earlier record or from a new one; before that it may be unknown."""
    settings = changed(model="org/model")
    before = [
        replace(found(row, settings=settings), revision=name) for row, name in zip(ROWS, [None, "a"], strict=False)
    ]
    sources = Sources(settings)
    assert sources.remaining(ROWS, before) == ROWS[2:]
    sources.check_revision(None)
    sources.check_revision("a")
    other = [*before, replace(before[1], revision="b")]
    for check in (lambda: sources.check_revision("b"), lambda: Sources(settings).remaining(ROWS, other)):
        with pytest.raises(
            UsageError, match=r"org/model has changed since .*: its commit was a and is now b"
        ) as caught:
            check()
        assert "--revision" in caught.value.hint


@pytest.mark.parametrize(("begun", "now"), [(0, 2048), (2048, 0), (2048, 1024)])
def test_a_device_that_prunes_other_sizes_elsewhere_is_refused(begun, now):
    """Some devices prune small inputs only after the tower. Failed rows do not record it."""
    before = [
        replace(found(row, failed=below is None), after_tower_below=below)
        for row, below in zip(ROWS, [None, begun, begun], strict=False)
    ]
    sources = Sources(SETTINGS)
    assert sources.remaining(ROWS, before) == [ROWS[0], *ROWS[3:]]
    sources.check_sizes(None)
    sources.check_sizes(begun)
    other = [*before, replace(before[1], after_tower_below=now)]
    for check in (lambda: sources.check_sizes(now), lambda: Sources(SETTINGS).remaining(ROWS, other)):
        with pytest.raises(
            UsageError, match="started on another device or version: the size limit for pruning only after the tower"
        ) as caught:
            check()
        assert "--device" in caught.value.hint


@pytest.mark.parametrize("before", [{}, {"model": None, "inputs": [None]}, {"inputs": []}, {"inputs": None}])
def test_what_is_unknown_of_files_is_accepted(before):
    assert Sources(SETTINGS).remaining(ROWS[:1], [replace(found(ROWS[0]), files=before)]) == []


@pytest.fixture(scope="module")
def qa(saved):
    return VideoQA(changed(model=str(saved)).load())


def test_each_record_is_what_asking_alone_gives(qa):
    settings = changed(max_new_tokens=8, temperature=0.7, fps=1.0, system="Be brief.")
    rows = [replace(row, start_s=1.0, answer="?") for row in ROWS]
    made = list(answers(qa.session, Span.group(rows), settings))
    assert [report.id for report in made] == [row.id for row in rows]
    for row, report in zip(rows, made, strict=True):
        video = qa.encode(row.paths[0], fps=1.0, start_s=1.0)
        answer = video.ask(row.question, system="Be brief.", max_new_tokens=8, temperature=0.7)
        said, alone = "".join(answer), answer.report
        assert (report.answer, report.question, report.error) == (said, row.question, None)
        for name in ("video", "sampling", "pruning", "tokens", "model", "generation", "env", "warnings", "cache"):
            assert getattr(report, name) == getattr(alone, name), name
        assert report.batch == {"row": row.asked | {"answer": "?"}, "settings": settings.record()}
    assert [report.time_ms.encode > 0 for report in made] == [True, False] * 3  # the first one pays
    assert all(report.time_ms.ttft_wall <= report.time_ms.total for report in made)


def test_a_record_names_a_video_as_its_row_does(qa):
    rows = [replace(ROWS[0], inputs=("square.mp4",))]
    (report,) = answers(qa.session, Span.group(rows), changed(max_new_tokens=1, frames=2))
    assert report.error is None and report.video.path == report.inputs[0].path == "square.mp4"


def test_the_next_video_is_read_meanwhile_and_no_further(qa, monkeypatch):
    """While the first video's questions are answered, the second video is read; the third is not opened."""
    monkeypatch.setattr("evoprune.session.upcoming.readers", lambda loaded: 1)
    events, second = [], threading.Event()

    def read(info, times, **how):
        events.append(info.path)
        if info.path == CLIPS[1]:
            second.set()
        return read_chunks(info, times, **how)

    monkeypatch.setattr("evoprune.session.encoding.read_chunks", read)
    before = threading.enumerate()
    with closing(answers(qa.session, Span.group(ROWS), changed(max_new_tokens=1))) as made:
        next(made)
        assert second.wait(20)
        time.sleep(0.1)
        assert events == CLIPS[:2]
        next(made), next(made)
        assert events[:2] == CLIPS[:2]
    check_ended(before)


def test_a_video_of_several_rows_is_read_once_and_waiting_is_told(qa, monkeypatch):
    """A video alone, together with others, and twice in a row."""
    monkeypatch.setattr("evoprune.session.upcoming.readers", lambda loaded: 1)
    read, waited = [], []

    def counted(info, times, **how):
        read.append(info.path)
        return read_chunks(info, times, **how)

    monkeypatch.setattr("evoprune.session.encoding.read_chunks", counted)
    asked = [CLIPS[:1], CLIPS[:2], [CLIPS[1], CLIPS[1], CLIPS[0]], CLIPS[2:]]
    rows = [Row(str(number), tuple(paths), tuple(paths), "What?") for number, paths in enumerate(asked)]
    made = list(answers(qa.session, Span.group(rows), changed(max_new_tokens=1, frames=4), on_wait=waited.append))
    assert [report.id for report in made] == ["0", "1", "2", "3"] and not any(report.error for report in made)
    assert read == CLIPS
    assert len(waited) == 2 * len(rows) and min(waited) >= 0 < sum(waited)


def test_a_row_with_messages_goes_on_with_them(qa):
    turns = (Turn(QUESTIONS[0], "A square moves."),)
    rows = [replace(ROWS[0], id=str(number), earlier=earlier) for number, earlier in enumerate([turns, (), turns])]
    first, single, again = answers(qa.session, Span.group(rows), changed(max_new_tokens=4))
    chat = qa.encode(CLIPS[0]).chat(messages=Turn.to_messages(turns))
    expected = chat.ask(ROWS[0].question, max_new_tokens=4)
    assert first.answer == again.answer == expected.text and first.tokens.prompt > single.tokens.prompt
    assert first.conversation == {"turns": 1, "dropped": 0} and single.conversation is None
    assert first.batch["row"]["messages"] == Turn.to_messages(turns) and "messages" not in single.batch["row"]


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("where", "problem", "kind", "stage", "failing"),
    [
        ("evoprune.session.encoding.probed", VideoError("gone"), "video", "read", 2),
        ("evoprune.vision.preprocess.pixel_patches", MemoryError(), "out_of_memory", "preprocess", 2),
        ("evoprune.session.encoding.encode_rows", FULL, "out_of_memory", "encode", 2),
        ("evoprune.language.generate.LanguageModel.prefill", FULL, "out_of_memory", "prefill", 1),
        ("evoprune.language.answer.best_of", FULL, "out_of_memory", "generate", 1),
        ("evoprune.session.encoding.encode_rows", ZeroDivisionError("1/0"), "bug", None, 2),
    ],
)
@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_is_a_record_and_the_next_one_goes_on(qa, monkeypatch, where, problem, kind, stage, failing, at):
    """A failure in the `at`-th call fails the rows it belongs to: one question, or all rows of the video."""
    settings = changed(max_new_tokens=1)
    whole = [report.answer for report in answers(qa.session, Span.group(ROWS), settings)]
    qa.loaded.patches.clear()  # otherwise nothing would be read again
    real, calls, problems = pkgutil.resolve_name(where), [], []

    def breaks(*args, **how):
        at_once = how.get("piece_units", 0)
        if not (calls and at_once < calls[-1][1]):  # otherwise a retry of the same video in smaller pieces
            calls.append([len(calls) + 1, at_once])
        calls[-1][1] = at_once
        if calls[-1][0] == at:
            raise problem.with_traceback(None)
        return real(*args, **how)

    monkeypatch.setattr(where, breaks)
    made = list(answers(qa.session, Span.group(ROWS), settings, on_failure=problems.append))
    first = (at - 1) * failing
    failed = list(range(first, first + failing))
    assert [report.id for report in made] == [row.id for row in ROWS]
    assert [i for i, report in enumerate(made) if report.error] == failed
    for i, report in enumerate(made):
        if i in failed:
            assert (report.answer, report.finish_reason, report.video.path) == (None, "error", ROWS[i].video)
            assert (report.error["type"], report.error["stage"]) == (kind, stage)
            assert report.batch == made[0].batch | {"row": ROWS[i].asked | {"answer": None}}
        else:
            assert report.answer == whole[i]
    assert len(problems) == 1
    assert isinstance(problems[0], OutOfMemory) or problems[0] is problem


def test_what_hangs_on_a_failure_is_let_go(qa, monkeypatch):
    """Memory that was not enough must be free again for the next video."""
    import gc
    import weakref

    class Big:
        pass

    alive, held = [], []

    def encode(*args, **how):
        big = Big()
        held.append(weakref.ref(big))
        alive.append(sum(each() is not None for each in held))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("evoprune.session.encoding.encode_rows", encode)
    gc.disable()
    try:
        assert all(report.error for report in answers(qa.session, Span.group(ROWS), SETTINGS))
    finally:
        gc.enable()
    assert len(alive) > 3 and set(alive) == {1}  # three videos, and retries in smaller pieces


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("where", ["session.encoding.encode_rows", "language.generate.LanguageModel.prefill"])
def test_an_interruption_is_no_failure(qa, monkeypatch, stop, where):
    def stops(*_, **__):
        raise stop

    monkeypatch.setattr(f"evoprune.{where}", stops)
    before = threading.enumerate()
    with pytest.raises(type(stop)):
        list(answers(qa.session, Span.group(ROWS), SETTINGS))
    check_ended(before)
