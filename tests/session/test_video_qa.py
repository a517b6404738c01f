"""The whole pipeline agrees with transformers at full budget, and answers do not depend on earlier questions."""

import gc
import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import evoprune
from evoprune.backend import Device
from evoprune.bench import TracedVideo, hugging_face_model
from evoprune.errors import ModelError, UsageError, VideoError, error_record
from evoprune.language import prompt_positions, video_positions
from evoprune.model import FAMILIES
from evoprune.report import Report, warning_lines
from evoprune.session import encoding
from evoprune.session.answers import Answer
from evoprune.session.encoding import OpenInputs, open_inputs
from evoprune.session.loading.model import load_model, prepare
from evoprune.timeline import Interval
from evoprune.video import read_chunks
from evoprune.video_qa import VideoQA
from evoprune.vision import pixel_patches
from tests.loading import described
from tests.tiny import save_tiny
from tests.video.files import write_said, write_video

CLIP, LONG = "samples/square.mp4", "samples/arrivals.webm"


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


@pytest.fixture(scope="module")
def models(saved, tmp_path_factory):
    """Return a tiny model of a family, or the demo model, together with its folder."""

    @cache
    def load(name):
        folder = {"demo": "demo", "qwen2_5_vl": str(saved)}.get(name)
        folder = folder or str(save_tiny(tmp_path_factory.mktemp("models") / name, family=name))
        return load_model(folder, dtype="fp32", pack=False), folder

    return load


def asked(video, question="What happens?", n=24, **settings):
    """Ask a question and read the whole answer."""
    made = video.ask(question, max_new_tokens=n, **settings)
    assert "".join(made) == made.text
    return made


def answer(video, question="What happens?", n=24, **settings):
    return asked(video, question, n, **settings).text


def picture(path, width, height):
    small = Image.fromarray(np.random.default_rng(width).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def hugging_faces(loaded, inputs, n) -> list[int]:
    """Return the tokens that transformers generates. For models without timestamps, evoprune computes the M-RoPE positions."""
    model, special = hugging_face_model(loaded.model), loaded.tokenizer.specials()
    ids, pads, spans, how = inputs["input_ids"][0].tolist(), {}, [], {}
    for name in ("video", "image"):
        pads[special[f"<|{name}_pad|>"]] = iter(inputs.get(f"{name}_grid_thw", torch.zeros(0)).tolist())
        setattr(model.config, f"{name}_token_id", special[f"<|{name}_pad|>"])
    per_second = getattr(model.config.vision_config, "tokens_per_second", None)
    seconds, video, at = iter(inputs.get("second_per_grid_ts", torch.zeros(0)).tolist()), model.config.video_token_id, 0
    while at < len(ids) and not FAMILIES[model.config.model_type].timestamps:
        if ids[at] in pads:
            t, h, w = next(pads[ids[at]])
            pace = next(seconds, 1.0) if ids[at] == video else 1.0
            spans.append((at, video_positions((t, h // 2, w // 2), pace, per_second)))
            at += t * h * w // 4 - 1
        at += 1
    if spans:
        rope = prompt_positions(len(ids), spans)
        how = {"position_ids": torch.cat([torch.arange(len(ids))[None], rope])[:, None]}
    model.config.vision_end_token_id = special["<|vision_end|>"]
    eos = list(loaded.eos_ids)
    made = model.generate(**inputs, **how, max_new_tokens=n, do_sample=False, eos_token_id=eos)[0, len(ids) :]
    return [token for token in made.tolist() if token not in eos]


INPUTS = ["v", "l", "p", "vp", "pp", "lvp", "pvlp"]  # videos and images
SIZES = [(101, 67), (997, 13), (3, 400), (1, 1), (27, 29), (140, 112)]


@pytest.mark.few(4)
@pytest.mark.parametrize("kinds", INPUTS)
@pytest.mark.parametrize("model", [*FAMILIES, "demo"])
@pytest.mark.parametrize("pack", [True, False])
def test_full_budget_is_hugging_faces_generate(models, model, kinds, pack, tmp_path):
    loaded, folder = models(model)
    ours, sizes = replace(loaded, model=loaded.model.shared()), iter(SIZES[pack::2])
    prepare(ours.model, pack)
    paths = [
        picture(tmp_path / f"{i}.png", *next(sizes)) if kind == "p" else {"v": CLIP, "l": LONG}[kind]
        for i, kind in enumerate(kinds)
    ]
    qa, question, limit = VideoQA(ours, budget=1.0), "Describe it.", {"max_visual_tokens": 4096}
    expected = hugging_faces(loaded, evoprune.processor_inputs(folder, paths, question, **limit), 16)
    apart = [qa.encode(path, **limit) for path in paths]
    for mine in (asked(qa.encode(paths, **limit), question, 16), qa.ask(apart, question, max_new_tokens=16)):
        assert mine.text is not None and mine.ids == expected
    assert [each.kind for each in mine.report.inputs] == ["picture" if kind == "p" else "video" for kind in kinds]


def test_what_counts_as_unchanged_does_not_depend_on_the_normalisation(loaded):
    other = {kind: replace(each, image_std=(5.0, 5.0, 5.0)) for kind, each in loaded.limits.items()}
    live, unchanged = set(), []
    for model in (loaded, described(loaded, limits=other)):
        qa = VideoQA(model, budget=0.25, method="reuse+divprune")
        live.add(asked(qa.encode(LONG), n=1).report.pruning.encoder_live_share)
        unchanged.append(TracedVideo.trace(qa.session, LONG).fates.source)
    assert len(live) == 1 and torch.equal(*unchanged)


@pytest.mark.few(1)
@pytest.mark.parametrize(("path", "budget"), [(CLIP, 0.25), (CLIP, 1.0), ([CLIP, LONG], 0.25)])
def test_an_answer_does_not_depend_on_what_was_asked_before(loaded, path, budget):
    qa = VideoQA(loaded, budget=budget)
    questions = ["What happens?", "How many red squares are there in the video?", "What happens?"]
    fresh = [answer(qa.encode(path), q) for q in questions]
    video = qa.encode(path)
    assert [answer(video, q) for q in questions] == fresh
    # Another system prompt in between, and answers that were not read to the end.
    assert answer(video, questions[0], system="Be brief.") == answer(qa.encode(path), questions[0], system="Be brief.")
    next(iter(video.ask(questions[1], max_new_tokens=9)))
    assert answer(video, questions[0]) == fresh[0]


@contextmanager
def broken(loaded, problem, layer=0):
    """Make a layer of the language model raise `problem`, or call it if it is a function."""

    def fail(*_):
        if isinstance(problem, BaseException):
            raise problem
        problem()

    mlp = loaded.model.model.language_model.layers[layer].mlp
    hook = mlp.gate_proj.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("way", ["begun", "read along", "answered in a thread", "broken off"])
def test_an_answer_does_not_go_on_after_another_question(loaded, way):
    """While the first answer pauses between two pieces, no other thread is blocked."""
    video = VideoQA(loaded).encode(CLIP)
    first = video.ask("What happens?", max_new_tokens=50, temperature=1.0)
    next(first)
    if way == "begun":
        next(video.ask("And then?", max_new_tokens=50, temperature=1.0))
    elif way == "read along":
        video.read_along("And then?", [5, 6, 7])
    elif way == "broken off":
        with broken(loaded, ZeroDivisionError()), pytest.raises(ZeroDivisionError):
            next(video.ask("And then?"))
    else:
        with ThreadPoolExecutor(1) as pool:
            said = pool.submit(lambda: answer(video, "And then?")).result(timeout=60)
        assert said == answer(video, "And then?")
    for read in (lambda: list(first), lambda: first.text):
        with pytest.raises(UsageError, match="another question"):
            read()


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["evoprune", "cdpruner"])
@pytest.mark.parametrize("shared_video", [True, False], ids=["one video", "a video each"])
def test_threads_get_their_answers_one_after_the_other(loaded, method, shared_video):
    qa = VideoQA(loaded, budget=0.25, method=method)
    questions = ["What happens?", "How many red squares are there?", "And then?"] * 2
    want = [answer(qa.encode(CLIP), question, n=8) for question in questions]
    video, start = qa.encode(CLIP), threading.Barrier(len(questions))

    def ask(question):
        start.wait()
        return (video if shared_video else qa.encode(CLIP)).ask(question, max_new_tokens=8).text

    with ThreadPoolExecutor(len(questions)) as pool:
        assert list(pool.map(ask, questions)) == want


@pytest.mark.parametrize("pieces", [0, 1])
def test_report_of_an_answer_that_was_cut_short(loaded, pieces):
    made = VideoQA(loaded).encode(CLIP).ask("What happens?", max_new_tokens=50, temperature=1.0)
    said = "".join(islice(made, pieces))
    made.close()
    assert (made.report.finish_reason, made.report.answer, made.text) == ("interrupt", said or None, said)
    assert list(made) == list(made) == [] and made.text == said


@pytest.mark.parametrize("passes", [0, 2], ids=["reading the prompt", "decoding"])
@pytest.mark.parametrize("problem", [ModelError("broken", "mend it", stage="prefill"), ValueError("odd")], ids=repr)
def test_an_answer_that_failed_never_looks_complete(loaded, passes, problem):
    video = VideoQA(loaded).encode(CLIP)
    made = video.ask("What happens?", max_new_tokens=9, temperature=1.0)
    before = [next(made) for _ in range(passes)]
    with broken(loaded, problem):
        for read in (lambda: made.text, lambda: made.text, lambda: list(made), lambda: str(made)):
            with pytest.raises(type(problem), match=str(problem)) as caught:
                read()
            assert getattr(caught.value, "hint", None) == getattr(problem, "hint", None)
    made.close()
    assert (made.report.finish_reason, made.report.answer) == ("error", "".join(before) if before else None)
    assert made.report.error == error_record(problem) and "error" in repr(made)
    # The first answer reports the time for encoding the video.
    assert (asked(video).report.time_ms.encode > 0) == (passes == 0)


def test_an_answer_that_failed_holds_no_memory_of_what_it_computed():
    seen = []

    def pieces():
        logits = torch.zeros(1)
        seen.append(weakref.ref(logits))
        yield from [] if logits.any() else 1 // 0

    made = Answer(Report(), pieces())
    for _ in range(2):
        with suppress(ZeroDivisionError):
            next(made)
        assert seen[0]() is None and made.report.error


def test_a_complete_answer_holds_no_memory_of_its_inputs(loaded):
    video = VideoQA(loaded, budget=0.25).encode(CLIP)
    made = video.ask("What happens?", max_new_tokens=2)
    seen = weakref.ref(video)
    assert made.text and made.ids
    del video
    gc.collect()
    assert seen() is None


@pytest.mark.few(1)
@pytest.mark.parametrize("when", ["reading the prompt", "decoding"])
def test_an_interruption_does_not_spoil_the_next_answer(loaded, when):
    qa, passes = VideoQA(loaded, budget=0.25), []
    video = qa.encode(CLIP)
    answer(video, "And then?")

    def stop():
        passes.append(1)
        if len(passes) == (1 if when == "reading the prompt" else 3):
            raise KeyboardInterrupt

    made = video.ask("What happens now?", max_new_tokens=24)
    with broken(loaded, stop, layer=-1), pytest.raises(KeyboardInterrupt):
        _ = made.text
    assert (made.report.finish_reason, made.report.error) == ("interrupt", None)
    assert answer(video) == answer(qa.encode(CLIP))


def test_small_frames_are_read_in_pieces(loaded, tmp_path, monkeypatch):
    """Enlarging small frames does not make a chunk too large."""
    write_video(tmp_path / "small.mp4", (np.full((32, 32, 3), i, np.uint8) for i in range(120)), fps=4)
    done = []
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 2**19)
    VideoQA(loaded).encode(tmp_path / "small.mp4", frames=32, progress=lambda *now: done.append(now))
    frames = [count for stage, count, _ in done if stage == "encode"]
    assert frames[0] <= 16 and frames[-1] == 32


@pytest.mark.few(1)
@pytest.mark.parametrize("threaded", [True, False])
def test_times_add_up(loaded, threaded, monkeypatch):
    monkeypatch.setattr(encoding, "OpenInputs", partial(OpenInputs, threaded=threaded))
    video = VideoQA(loaded, budget=0.25).encode(CLIP)
    times = asked(video).report.time_ms
    busy = times.read + times.preprocess + times.encode + times.prefill + times.generate
    assert times.ttft_wall <= times.total and times.encode + times.prefill <= times.ttft_wall
    assert times.read + times.preprocess + times.prefill <= times.ttft_wall
    assert threaded or busy <= times.total + 1
    assert times.encode_prune < times.encode and times.ttft_model == times.encode + times.prefill
    again = asked(video, "And then?").report.time_ms
    assert again.read == again.encode == again.encode_prune == 0 and again.ttft_model == again.prefill > 0


@pytest.mark.few(2)
@pytest.mark.parametrize("budget", [1.0, 0.25])
@pytest.mark.parametrize("method", ["evoprune", "evs"])
def test_reading_in_a_thread_changes_nothing(loaded, monkeypatch, budget, method):
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    monkeypatch.setattr(Device, "piece_units", 24)
    qa, done = VideoQA(loaded, budget=budget, method=method), []
    beside = qa.encode(LONG, progress=lambda *now: done.append(now))
    monkeypatch.setattr(encoding, "OpenInputs", partial(OpenInputs, threaded=False))
    apart = qa.encode(LONG)
    for name in ("features", "kept", "rows", "unit_to_row"):
        assert torch.equal(getattr(beside.encoded, name), getattr(apart.encoded, name)), name
    assert beside.encoded.layers == apart.encoded.layers
    # The last stage reports progress in order, then the layers, which need the whole video.
    layers = [("layers", 1, 2), ("layers", 2, 2)]
    read = [count for stage, count, _ in done if stage == "read"]  # reported in between, as frames arrive
    assert read[-1] == 16 and read == sorted(set(read))
    assert [step for step in done if step[0] != "read"] == [("encode", n, 16) for n in range(2, 17, 2)] + layers


@pytest.mark.few(2)
@pytest.mark.parametrize("kept", [True, False])
def test_a_video_that_is_begun_early_is_the_same_video(loaded, monkeypatch, kept):
    """If patches are stored, all of them are ready before the encoding. Otherwise, only those that fit are. None is read twice."""
    monkeypatch.setattr("evoprune.session.encoding.AHEAD_BYTES", 0)
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    monkeypatch.setattr(encoding._Input, "_shares", kept)
    qa, made = VideoQA(loaded, budget=0.25), []

    def counted(*args):
        made.append(1)
        return pixel_patches(*args)

    monkeypatch.setattr("evoprune.vision.preprocess.pixel_patches", counted)
    at_once = qa.encode(LONG)
    chunks, made[:] = len(made), []
    loaded.patches.clear()
    with closing(open_inputs(qa.session, [LONG])) as video:
        assert made == []
        video.begin()
        ready = chunks if kept else 1
        until = time.monotonic() + 10
        while len(made) < ready and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)
        assert len(made) == ready
        video._inputs[0].timeline.add([Interval("read", -1, -1000.0, 0.0)])  # by another thread, before any wait
        early = video.encode()
    assert early.report.time_ms.read >= 1e6 > early.report.time_ms.total
    assert len(made) == chunks and torch.equal(early.encoded.features, at_once.encoded.features)
    assert answer(early) == answer(at_once) and early.report.sampling == at_once.report.sampling


@pytest.fixture
def reading(monkeypatch):
    """Count how often reading a video ends, call a test's callback for each chunk, and check that no thread is left."""
    noted, threads = SimpleNamespace(closed=0, each=lambda: None), set(threading.enumerate())

    def read(*args, **settings):
        try:
            for chunk in read_chunks(*args, **settings):
                yield chunk
                noted.each()
        finally:
            noted.closed += 1

    monkeypatch.setattr("evoprune.session.encoding.read_chunks", read)
    yield noted
    assert noted.closed == 1 and set(threading.enumerate()) <= threads


def test_a_video_that_was_begun_and_is_not_wanted(loaded, reading):
    video = open_inputs(VideoQA(loaded).session, [CLIP])
    video.begin()
    video.close()
    video.close()


@pytest.mark.few(2)
@pytest.mark.parametrize("problem", [VideoError("gone"), KeyboardInterrupt(), ZeroDivisionError()])
@pytest.mark.parametrize("stage", ["read", "preprocess", "encode"])
def test_what_goes_wrong_in_a_stage_ends_all_of_them(loaded, monkeypatch, stage, problem, reading):
    calls = []

    def fails(*_):
        calls.append(1)
        if len(calls) == 3:
            raise problem.with_traceback(None)

    def preprocess(*args):
        fails()
        return pixel_patches(*args)

    monkeypatch.setattr(Device, "piece_units", 24)
    monkeypatch.setattr("evoprune.video.plan.CHUNK_BYTES", 1)
    if stage == "read":
        reading.each = fails
    if stage == "preprocess":
        monkeypatch.setattr("evoprune.vision.preprocess.pixel_patches", preprocess)
    layer = loaded.model.model.visual.blocks[0].mlp.down_proj
    hook = layer.register_forward_pre_hook(fails if stage == "encode" else lambda *_: None)
    try:
        with pytest.raises(type(problem)) as caught:
            # More than three pieces, which the first layer's MLP computes one by one.
            VideoQA(loaded, method="evoprune:reuse=0:first=0").encode(CLIP, frames=20)
    finally:
        hook.remove()
    assert caught.value is problem


def test_a_signal_while_a_frame_is_waited_for(loaded, reading):
    """Ctrl-C reaches the main thread while the reader thread is working."""

    def interrupt():
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        time.sleep(0.2)

    reading.each = interrupt
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            VideoQA(loaded).encode(CLIP)
    finally:
        signal.signal(signal.SIGINT, before)


def test_settings_are_checked_before_weights_are_read():
    for name, value in {"budget": 2, "method": "magic", "dtype": "fp64"}.items():
        with pytest.raises(UsageError):
            VideoQA.load("no/such", **{name: value})


def test_an_answer_streams_and_has_a_report_of_its_own(loaded):
    qa = VideoQA(loaded)
    video = qa.encode(CLIP)
    before = video.report.to_json()
    assert video.report.question is video.report.time_ms.prefill is None
    assert Report.from_json(before).sampling == video.report.sampling
    first = video.ask("What happens?", max_new_tokens=9, temperature=1.0)
    assert first.report.finish_reason is first.report.answer is first.report.time_ms.total is None
    pieces = [next(first)]
    assert first.report.answer == pieces[0]
    pieces += first
    assert first.text == "".join(pieces) == "".join(first) and first.report.finish_reason in ("stop", "length")
    again = video.ask("What happens?", max_new_tokens=9, temperature=1.0)
    assert again.text == str(again) == first.text  # getting the text generates the rest
    second = asked(video, "And then?", n=2)
    assert first.report.question == "What happens?" and second.report.question == "And then?"
    third = qa.ask(video, "And now?", max_new_tokens=2)
    assert third.text is not None and third.report.time_ms.encode == 0
    assert first.report.id != second.report.id and first.report.time_ms.encode > second.report.time_ms.encode == 0
    assert video.report.to_json() == before


def test_an_answer_compares_as_its_text(loaded):
    video = VideoQA(loaded).encode(CLIP)

    def ask():
        return video.ask("What happens?", max_new_tokens=9)

    text = ask().text
    assert ask() == text and text[2:5] in ask()
    answer = ask()
    assert answer != text + "!" and 3 not in answer and answer != 3 and answer == ask()
    with pytest.raises(TypeError, match="unhashable"):
        set([answer])


def test_each_question_may_have_a_seed_of_its_own(loaded):
    kept = {tuple(VideoQA(loaded, method="random", seed=seed).encode(CLIP).encoded.kept.tolist()) for seed in (1, 1, 2)}
    assert len(kept) == 2
    qa = VideoQA(loaded, seed=5)
    assert qa.session.unpruned().pruning.seed == 5  # the session to compare with
    video = qa.encode(CLIP)

    def drawn(**seed):
        return video.ask("What happens?", max_new_tokens=12, temperature=2.0, **seed)

    assert len({drawn(seed=seed).text for seed in range(4)}) > 1
    assert drawn().text == drawn(seed=5).text and drawn(seed=2).report.generation["seed"] == 2
    with pytest.raises(UsageError, match="seed is 'a', not a whole number or None"):
        drawn(seed="a")


def test_they_say_in_a_line_what_they_are(loaded):
    qa = VideoQA(loaded, budget="fast", seed=3)
    assert repr(qa) == f"<VideoQA {loaded.id!r} in fp32 on cpu: method 'evoprune', budget fast, seed 3>"
    video = qa.encode(CLIP, name="clip")
    assert repr(video) == (
        "<EncodedInputs 'clip': 12 frames, 6 frame pairs of 4x6 units, 14 of 144 visual tokens kept>"
    )
    assert "2 frames, 1 frame pair of 4x6 units" in repr(qa.encode(CLIP, frames=2))
    assert repr(video.encoded).startswith("<Encoded: 14 of 144 visual tokens, ")
    assert repr(video.ask("What happens?")) == "<Answer, not read yet; .text reads it>"
    unread = video.ask("What happens?", max_new_tokens=2)
    assert str(unread.report).splitlines()[0] == "answer     not read yet; answer.text reads it"
    assert "not read yet" in repr(unread.report)
    shown = []
    unread._repr_pretty_(SimpleNamespace(text=shown.append), False)  # what IPython calls
    assert shown == [unread.text] and "not read yet" not in str(unread.report) + repr(unread.report)
    made = asked(video, n=1)
    assert repr(made) == f"<Answer {made.text!r}, length>"
    assert made.report.tokens.new == 1 and made.report.rate.generate_tok_s is None


@pytest.mark.parametrize("method", ["evoprune", "divprune"])
def test_a_black_video_is_a_video(loaded, tmp_path, method):
    write_video(tmp_path / "black.mp4", np.zeros((8, 112, 112, 3), np.uint8), fps=4)
    video = VideoQA(loaded, budget=0.25, method=method).encode(tmp_path / "black.mp4")
    assert len(video.encoded.kept) == round(0.25 * video.plan.visual_tokens)
    assert asked(video).report.warnings[0] == "equal_scores" and video.report.warnings == ["equal_scores"]
    # Its frames may be uniform and still differ.
    assert "black.mp4 shows only flat colors" in " ".join(warning_lines(video.report))


@pytest.mark.parametrize(
    ("asked_for", "limited"),
    [
        *[(more, True) for more in ({"frames": 10_000}, {"fps": 500}, {"frames": 12, "max_visual_tokens": 30})],
        *[({"fps": 12, "max_frames": 8}, False), ({"max_visual_tokens": 30}, False)],
    ],
    ids=str,
)
def test_fewer_or_smaller_frames_than_asked_for_are_a_warning(loaded, asked_for, limited):
    report = VideoQA(loaded).encode(CLIP, **asked_for).report
    assert report.warnings == ["limited"] * limited


def test_what_is_not_shown_as_players_show_it_is_a_warning(loaded, tmp_path):
    _, warning = write_said(tmp_path / "absurd.mkv")
    assert VideoQA(loaded).encode(tmp_path / "absurd.mkv").report.warnings == [warning]


@pytest.mark.few(1)
@pytest.mark.parametrize("method", ["downscale", "subsample"])
def test_less_input_is_what_a_plan_for_less_would_give(loaded, method):
    """Decoding, positions and everything else are the same as if the video had been sampled that way from the start."""
    less = VideoQA(loaded, budget=0.25, method=method).encode(CLIP)
    limits = replace(loaded.video, min_pixels=1, max_pixels=less.plan.height * less.plan.width)
    other = VideoQA(described(loaded, limits={"video": limits}), budget=1.0).encode(
        CLIP, frames=less.plan.sampling.frames
    )
    assert other.plan.grid == less.plan.grid and other.plan.sampling.times_s == less.plan.sampling.times_s
    assert torch.equal(other.encoded.features, less.encoded.features)
    assert answer(other) == answer(less)


# --- methods that read the question ------------------------------------------------------------------------------------

ASKED = ["What happens?", "How many red squares are there in the video?", "What happens?"]


def test_one_encoding_serves_every_question(loaded, monkeypatch):
    """A method that reads the question selects again for each question, as if the video had been encoded only for it."""
    qa = VideoQA(loaded, budget=0.25, method="cdpruner")
    fresh = []
    for question in ASKED:
        video = qa.encode(CLIP)
        fresh.append((answer(video, question), video.encoded.kept.tolist()))
    without = VideoQA(loaded, budget=0.25, method="cdpruner:question=false").encode(CLIP)
    video = qa.encode(CLIP)
    monkeypatch.setattr("evoprune.session.encoding.encode_rows", lambda *_, **__: pytest.fail("encoded again"))
    shared = [(answer(video, question), video.encoded.kept.tolist()) for question in ASKED]
    assert shared == fresh and shared[0] == shared[2] and shared[0][1] != shared[1][1]
    assert without.encoded.kept.tolist() not in (shared[0][1], shared[1][1])


def test_what_is_reported_of_it(loaded):
    video = VideoQA(loaded, budget=0.25, method="cdpruner").encode(CLIP)
    blank = video.report.pruning
    assert (blank.visual_tokens_kept, blank.kept_ratio, blank.visual_tokens_in) == (0, 0.0, 144)
    encoding = video._encodings[0].seconds["encode"] = 1000.0  # large enough to stand out from the selection time
    for turn, question in enumerate(ASKED):
        report = asked(video, question).report
        assert report.pruning.visual_tokens_kept == report.tokens.visual == 36 and report.pruning.kept_ratio == 0.25
        assert report.pruning.kept_per_pair == [6] * 6 and report.cache == "off"
        times = report.time_ms
        assert times.ttft_model == pytest.approx(times.encode + times.prefill)
        if not turn:  # the encoding is counted once, the selection every time
            assert times.encode > encoding * 1000
        else:
            assert 0 < times.encode_prune <= times.encode < encoding * 1000 and times.read == 0
    assert Report.from_json(report.to_json()).pruning == report.pruning


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_is_refused_instead_of_waiting_for_threads_that_it_lacks(loaded):
    qa = VideoQA(loaded)
    video = qa.encode(CLIP)
    array = np.zeros((56, 56, 3), np.uint8)
    stream = qa.stream()
    calls = [lambda: qa.encode(CLIP), lambda: qa.ask(CLIP, "What?"), lambda: video.ask("What?")]
    calls += [lambda: video.chat().ask("What?"), lambda: qa.find(CLIP, "a star"), lambda: stream.add(array, 0.0)]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pid = os.fork()
        if not pid:
            signal.alarm(20)  # instead of waiting forever
            refused = 0
            for call in calls:
                try:
                    call()
                except UsageError as problem:
                    refused += "load the model in each process" in problem.hint
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == len(calls)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"quantize": 8}, "quantize is 8, not auto, none, int8 or int4"),
        ({"engine": 1}, "engine is 1, not auto, native or transformers"),
    ],
)
def test_an_option_of_another_type_lists_the_words(option, says):
    with pytest.raises(UsageError, match=says):
        VideoQA.load("demo", **option)
