"""Test streams: one window equals a file, memory stays bounded, windows are thinned, and questions leave no trace."""

import math
import random
import threading
import time
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch

from evoprune.backend import Device
from evoprune.bundled import DEMOS
from evoprune.errors import OutOfMemory, UsageError
from evoprune.language import LanguageModel
from evoprune.live import windows
from evoprune.live.gate import Gate, GiveWay
from evoprune.session import load_model
from evoprune.video import read_chunks
from evoprune.video_qa import VideoQA
from experiments.demo import batches, scenes_batches
from tests.loading import described
from tests.tiny import save_tiny

CLIP = "samples/square.mp4"
QUESTION = "What colour is the square?"


@pytest.fixture(scope="module")
def demo():
    """The demo model, with its range of positions limited only by its context length."""
    return described(load_model("demo", pack=False), folder=None)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("qwen3"), family="qwen3_vl")
    return load_model(str(folder), dtype="fp32", pack=False)


@pytest.fixture(scope="module")
def qwen3_5(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("qwen3_5"), family="qwen3_5")
    return load_model(str(folder), dtype="fp32", pack=False)


def frames_of(video):
    """Return the sampled frames of a file and their times."""
    with closing(read_chunks(video.plan.info, video.plan.sampling.times_s)) as chunks:
        return [
            (frame.copy(), time)
            for chunk in chunks
            for frame, time in zip(chunk.pixels, video.plan.sampling.times_s[chunk.first :], strict=False)
        ]


def noise(number, size=112):
    """Return a frame that differs from every other number's frame."""
    return np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)


def fed(stream, seconds, fps=2.0, start=0.0):
    for number in range(round(seconds * fps)):
        stream.add(noise(number), start + number / fps)
    return stream


@pytest.mark.few(2)
@pytest.mark.parametrize("budget, method", [(1.0, "none"), (0.25, "evoprune"), (0.1, "adjacent"), (0.25, "visionzip")])
@pytest.mark.parametrize("model", ["demo", "qwen3", "qwen3_5"])
def test_a_stream_of_one_window_has_the_answer_of_the_file(model, budget, method, request):
    qa = VideoQA(request.getfixturevalue(model), budget=budget, method=method)
    video = qa.encode(CLIP)
    rate = video.plan.sampling.frames / video.plan.info.duration_s
    with qa.stream(fps=rate, window_s=video.plan.info.duration_s) as stream:
        for frame, time in frames_of(video):
            assert stream.add(frame, time)
        of_file, of_stream = (asked.ask(QUESTION, repetition_penalty=1.5) for asked in (video, stream))
        assert of_stream.text == of_file.text and of_stream.ids == of_file.ids
    ours, theirs = of_stream.report, of_file.report
    assert ours.tokens == theirs.tokens and ours.pruning == theirs.pruning
    assert ours.stream["tokens"] == theirs.tokens.visual and ours.stream["frames"] == theirs.sampling.frames


def keys_of(cache):
    """Return the keys of all columns in the first attention layer, `[1, kv_heads, length, head_dim]`."""
    return cache.room(next(layer for layer, state in enumerate(cache.states) if state is None), 0)[2]


def logits(stream):
    """Return the logits of the first word about the stream so far, without changing the stream."""
    answer = stream.ask(QUESTION, max_new_tokens=1)
    next(answer, None)
    cache = stream._memory.cache
    state = []
    for layer, recurrent in enumerate(cache.states):
        state += [torch.cat(cache.room(layer, 0)[2:])] if recurrent is None else recurrent
    answer.close()
    return state


def waiting(stream):
    """Return the number of encoded windows that the language model has not read yet, in a stream that has forgotten none."""
    return stream.encoded - stream.seen.windows


def watch_encoder(monkeypatch, watch):
    """Call `watch` before each layer of the encoder, and return the list of all results of `encode_segment`."""
    usual, found = windows.encode_segment, []

    def watched(*given, pause, **options):
        found.append(usual(*given, pause=lambda: (watch(), pause()), **options))
        return found[-1]

    monkeypatch.setattr(windows, "encode_segment", watched)
    return found


@pytest.mark.parametrize("model", ["demo", "qwen3_5"])
def test_a_question_leaves_no_trace(model, request):
    qa = VideoQA(request.getfixturevalue(model), budget=0.25)
    with fed(qa.stream(window_s=2.0), 6) as asked, fed(qa.stream(window_s=2.0), 6) as silent:
        assert asked.ask("What happens?").text
        half = asked.ask("How many?", max_new_tokens=8)
        next(half, None)
        fed(asked, 2, start=6.0)  # a window finished during an answer is read after the answer
        left = waiting(asked)
        half.close()
        fed(silent, 2, start=6.0)
        assert all(torch.equal(a, b) for a, b in zip(logits(asked), logits(silent), strict=True))
        assert left == (half.report.finish_reason == "interrupt") and asked.seen == silent.seen


@pytest.mark.parametrize("model", ["demo", "qwen3", "qwen3_5"])
def test_a_question_sees_the_frames_of_the_unfinished_window(model, request):
    qa = VideoQA(request.getfixturevalue(model), budget=0.25)
    with fed(qa.stream(window_s=4.0), 7) as stream, fed(qa.stream(window_s=4.0), 7) as ended:
        ended.flush()
        answer, same = stream.ask(QUESTION), ended.ask(QUESTION)
        assert answer.text == same.text and answer.ids == same.ids and answer.report.tokens == same.report.tokens
        assert answer.report.stream == same.report.stream and answer.report.stream["end_s"] == 7.0
        assert answer.report.pruning == same.report.pruning and answer.report.sampling == same.report.sampling
        # The end of the stored windows; the end that a question sees.
        assert (stream.seen.end_s, stream.until_s) == (4.0, 7.0)
        # The first question paid for the encoding.
        assert answer.report.time_ms.encode and not same.report.time_ms.encode
        assert answer.report.time_ms.ttft_wall > answer.report.time_ms.encode


@pytest.mark.parametrize("model", ["demo", "qwen3_5"])
def test_the_unfinished_window_leaves_no_trace(model, request):
    """Compares a stream asked after each frame with one never asked. Some frames change and some do not."""
    frames = [noise(0) if number % 5 else noise(number) for number in range(18)]
    qa, ends = VideoQA(request.getfixturevalue(model), budget=0.25), []
    with qa.stream(window_s=4.0, memory_s=8.0) as asked, qa.stream(window_s=4.0, memory_s=8.0) as silent:
        for number, frame in enumerate(frames):
            asked.add(frame, number / 2)
            silent.add(frame, number / 2)
            answer = asked.ask(QUESTION, max_new_tokens=2)
            assert answer.text and answer.report.tokens.visual == answer.report.stream["tokens"]
            ends.append(answer.report.stream["end_s"])
        assert asked.seen == silent.seen and ends == [(number + 1) / 2 for number in range(18)]
        assert all(torch.equal(a, b) for a, b in zip(logits(asked), logits(silent), strict=True))


def test_what_was_encoded_for_a_question_stays_where_no_frame_came_since(demo, monkeypatch):
    with fed(VideoQA(demo, budget=0.25).stream(window_s=8.0), 3) as stream:
        encoded = watch_encoder(monkeypatch, lambda: None)
        first, second = (stream.ask(QUESTION) for _ in range(2))
        assert first.text == second.text and len(encoded) == 1
        stream.flush()
        third = stream.ask(QUESTION)
        assert third.text == first.text and third.report.stream == first.report.stream and len(encoded) == 1
        assert stream.encoded == stream.seen.windows == 1 and stream.until_s == 3.0
        assert [each.report.time_ms.encode > 0 for each in (first, second, third)] == [True, False, False]


def test_the_window_that_is_encoded_is_waited_for(demo, monkeypatch):
    with VideoQA(demo, budget=0.25).stream(window_s=2.0) as stream:
        begun, goes_on = threading.Event(), threading.Event()
        watch_encoder(monkeypatch, lambda: (begun.set(), goes_on.wait(10)))
        feeding = threading.Thread(target=fed, args=(stream, 2))
        feeding.start()
        assert begun.wait(10)
        threading.Timer(0.1, goes_on.set).start()
        answer = stream.ask(QUESTION, max_new_tokens=2)
        assert answer.text and answer.report.stream["end_s"] == stream.report.video.duration_s == 2.0
        feeding.join(30)


def test_a_window_of_half_of_the_frames_has_half_of_the_tokens(demo):
    qa = VideoQA(demo, budget=0.25)
    with qa.stream(window_s=8.0) as full, qa.stream(window_s=8.0) as half:
        fed(full, 8), fed(half, 8, fps=1.0)
        half.flush()
        assert (full.seen.frames, half.seen.frames) == (16, 8) and full.seen.tokens == 2 * half.seen.tokens


@pytest.mark.parametrize("model", ["demo", "qwen3", "qwen3_5"])
def test_windows_are_read_as_one_video(model, request):
    """Unpruned windows have the columns and positions of one video, because frame pairs do not attend to each other."""
    qa = VideoQA(request.getfixturevalue(model), budget=1.0)
    with fed(qa.stream(window_s=8.0), 8) as one, fed(qa.stream(window_s=2.0), 8) as four:
        assert four.seen.windows == 4 and one.seen.windows == 1
        for a, b in zip(logits(one), logits(four), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_memory_does_not_grow_and_the_oldest_windows_are_thinned_step_by_step(demo):
    with VideoQA(demo, budget=0.25).stream(window_s=2.0, memory_s=20.0) as stream:
        held, before, capacities = [], {}, set()
        for number in range(50):
            fed(stream, 2, start=2.0 * number)
            cache, windows = stream._memory.cache, stream._memory.windows
            held.append(stream.seen.tokens)
            assert (
                cache.length
                == stream._memory._head + held[-1]
                == stream._memory._head + sum(len(w.order) for w in windows)
            )
            for window in windows:
                now = set(window.order.tolist())
                assert now == set(range(len(now))) and now <= before.get(window.start_s, now)
                assert len(before.get(window.start_s, now)) <= 2 * len(now) + 1
                before[window.start_s] = now
            gone = before.keys() - {window.start_s for window in windows}
            assert all(len(before[start]) <= 1 for start in gone)
            counts = [len(window.order) for window in windows]
            assert counts == sorted(counts)
            capacities.add(cache.capacity)
        most = max(counts)
        assert max(held) == 10 * most and min(held[10:]) >= 9 * most and len(capacities) == 1
        # five whole, five halves, ...
        assert stream.seen.windows == 5 * most.bit_length() and stream.ask(QUESTION).text


@pytest.mark.full
@pytest.mark.parametrize("method", ["none", "evoprune-merge", "tome", "evs", "divprune", "visionzip", "random", "pool"])
def test_windows_of_any_method_are_thinned(demo, method):
    with fed(VideoQA(demo, budget=0.25, method=method).stream(window_s=2.0, memory_s=12.0), 40) as stream:
        counts = [len(window.order) for window in stream._memory.windows]
        assert counts == sorted(counts) and counts[0] < counts[-1]
        answer = stream.ask(QUESTION, max_new_tokens=2)
        assert answer.text and answer.report.tokens.visual == sum(counts)


def bytes_of(cache):
    """Return the size of a cache in bytes, including recurrent states."""
    stored = [cache.room(i, 0)[2:] if state is None else state for i, state in enumerate(cache.states)]
    return sum(tensor.untyped_storage().nbytes() for each in stored for tensor in each)


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.full)])
def test_the_memory_of_recurrent_layers_is_bounded(qwen3_5, count):
    with VideoQA(qwen3_5, budget=0.25).stream(fps=2.0, window_s=1.0, memory_s=8.0) as stream:
        sizes, starts = [], []
        for number in range(count):
            for half in (0, 1):
                stream.add(noise(2 * number + half, 56), number + half / 2)
            if number % 20 == 19:
                assert stream.ask(QUESTION, max_new_tokens=3).report.stream["end_s"] == number + 1
                stream.add(noise(number, 56), number + 1)  # the next window's first frame
                answer = stream.ask(QUESTION, max_new_tokens=3)  # also reads the unfinished window
                assert answer.report.stream["end_s"] > number + 1
                stream.catch_up()
                sizes.append(bytes_of(stream._memory.cache))
                starts.append(stream.seen.start_s)
        assert max(sizes) == sizes[1] and starts[-1] > count / 2


def test_recurrent_states_include_thinned_windows(qwen3_5):
    """Thinning removes keys, but the states are those after the windows were read as a whole."""
    qa = VideoQA(qwen3_5, budget=0.25)
    with qa.stream(window_s=2.0, memory_s=8.0) as thinned, qa.stream(window_s=2.0, memory_s=60.0) as whole:
        fed(thinned, 8), fed(whole, 8)
        expected = [state.recurrent for state in whole._memory.cache.states if state]
        assert not thinned.seen.thinned
        with torch.inference_mode():
            thinned._memory._thin([1] * 4)
        assert thinned.seen.thinned and thinned.seen.tokens < whole.seen.tokens
        made = [state.recurrent for state in thinned._memory.cache.states if state]
        assert len(made) == 4 and all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
        assert thinned.ask(QUESTION, max_new_tokens=2).text is not None
        thinned.catch_up()
        fed(thinned, 2, start=8.0)
        assert thinned.seen.windows == 5 and thinned.ask(QUESTION, max_new_tokens=2).text is not None


def test_a_question_that_fails_leaves_the_recurrent_states(qwen3_5, monkeypatch):
    qa = VideoQA(qwen3_5, budget=0.25)
    with fed(qa.stream(window_s=2.0), 5) as broken, fed(qa.stream(window_s=2.0), 5) as whole:
        usual = LanguageModel.prefill

        def interrupted(*given, **options):
            usual(*given, **options)
            raise KeyboardInterrupt

        monkeypatch.setattr(LanguageModel, "prefill", interrupted)
        with pytest.raises(KeyboardInterrupt):
            str(broken.ask(QUESTION))
        monkeypatch.undo()
        fed(broken, 2, start=5.0), fed(whole, 2, start=5.0)
        assert all(torch.equal(a, b) for a, b in zip(logits(broken), logits(whole), strict=True))


def test_what_is_left_keeps_its_keys(demo):
    with VideoQA(demo, budget=0.25).stream(window_s=2.0, memory_s=8.0) as stream:
        fed(stream, 8)
        cache, head = stream._memory.cache, stream._memory._head
        keys, order = keys_of(cache)[0, :, head:].clone(), stream._memory.windows[0].order
        fed(stream, 2, start=8.0)
        left = len(stream._memory.windows[0].order)
        assert 0 < left < len(order)
        assert torch.equal(keys_of(cache)[0, :, head : head + left], keys[:, (order < left).nonzero()[:, 0]])


@pytest.mark.parametrize("model", ["demo", "qwen3_5"])
def test_the_beginning_can_be_moved_without_a_change_of_distances(model, request):
    model = request.getfixturevalue(model)
    with fed(VideoQA(model, budget=0.25).stream(window_s=2.0), 6) as stream:
        memory = stream._memory
        keys = keys_of(memory.cache)
        whole = slice(memory._head, memory.cache.length)
        old = keys[0, :, whole].clone()
        with torch.inference_mode():
            memory.cache.move(model.model.config.text_config, whole, -40 * memory._axes)
            moved = keys[0, :, whole].clone()
            memory.cache.move(model.model.config.text_config, whole, 40 * memory._axes)
        products = [each @ each.transpose(1, 2) for each in (old, moved)]
        torch.testing.assert_close(*products, atol=1e-3, rtol=1e-4)
        torch.testing.assert_close(keys[0, :, whole], old, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(moved, old, atol=1e-2)


@pytest.mark.full
def test_a_memory_longer_than_the_context_is_moved_now_and_then(demo):
    with VideoQA(demo, budget=0.25).stream(window_s=2.0, memory_s=20.0) as stream:
        fed(stream, 2)
        memory, moves = stream._memory, []
        memory._room = 48  # positions: 24 s, shorter than 20 windows
        for number in range(1, 40):
            fed(stream, 2, start=2.0 * number)
            moves.append(memory._moved)
            assert memory.following <= memory._head + 48 + 1 and memory.windows[0].time >= memory._moved
            assert memory.cache.length == memory._head + stream.seen.tokens
        assert 5 < len(set(moves)) < 30 and stream.ask(QUESTION).text


def test_qwen3_forgets_the_time_of_a_frame_pair_with_its_last_token(qwen3):
    qa = VideoQA(qwen3, budget=0.25)
    with fed(qa.stream(window_s=4.0), 4) as stream:
        (window,) = stream._memory.windows
        texts = len(window.order) - window.tokens
    with fed(qa.stream(window_s=4.0, memory_s=12.0), 60) as stream:
        memory, counts = stream._memory, []
        for window in memory.windows:
            counts.append((window.tokens, len(window.order) - window.tokens))
            assert window.tokens and (~window.visual).any()
            assert set(window.order[~window.visual].tolist()) <= set(window.order[window.visual].tolist())
        assert counts == sorted(counts) and 0 < counts[0][1] < texts <= counts[-1][1]
        assert memory.cache.length == sum(map(sum, counts)) + stream._memory._head
        answer = stream.ask(QUESTION, max_new_tokens=2)
        assert answer.text is not None and answer.report.tokens.visual == stream.seen.tokens
        assert answer.report.tokens.text > sum(text for _, text in counts)


def test_qwen3_reads_a_moved_window_as_the_first_one(qwen3):
    """After a window is forgotten, the next one has the same keys as at the beginning if its timestamps have as many digits."""
    qa, keys = VideoQA(qwen3, budget=0.25), []
    for later in (False, True):
        with fed(qa.stream(window_s=4.0), 4) as stream:
            memory = stream._memory
            size = memory.following - stream._memory._head
            memory._room = size + 1  # room for one window
            fed(stream, 4 * later, start=4.0)
            assert len(memory.windows) == 1 and memory.following == stream._memory._head + size
            assert memory._moved == (size if later else 0)
            visual = memory.windows[0].visual.nonzero()[:, 0] + stream._memory._head
            keys.append(keys_of(memory.cache)[0, :, visual])
    torch.testing.assert_close(*keys, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "module", "pairs"), [("demo", batches, "LENGTHS"), ("demo-scenes", scenes_batches, "PAIRS")]
)
def test_the_range_of_a_bundled_model_is_its_longest_clip_of_training(name, module, pairs):
    seconds = max(count for count, _ in getattr(module, pairs)) * max(module.PACES)
    assert DEMOS[name].span == 2 * seconds  # two positions per second


def test_a_bundled_model_forgets_what_is_further_away_than_its_longest_clip():
    """After a gap of an hour, windows are read as at the beginning of a stream."""
    qa = VideoQA(load_model("demo", pack=False), budget=0.25)
    with fed(qa.stream(window_s=4.0), 4) as alone, fed(qa.stream(window_s=4.0), 4) as later:
        fed(later, 4, start=3600.0)
        assert later.seen.windows == 1 and later._memory.following == alone._memory.following
        for one, other in zip(logits(alone), logits(later), strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
        fed(later, 60, start=3604.0)
        assert later.seen.windows == 6 and later._memory.following <= later._memory._head + 48  # 24 seconds


def test_frames_that_are_too_many_too_few_or_of_another_size(demo):
    with VideoQA(demo, budget=0.25).stream(window_s=4.0) as stream:
        assert (stream.scaled(noise(0, 200)) == noise(0, 200)).all()
        looked = [stream.add(noise(number), number / 30) for number in range(121)]
        assert stream.scaled(noise(0, 200)).shape == noise(0).shape
        assert sum(looked) == 9 and all(looked[::15])
        whole = stream.seen.tokens
        stream.add(noise(1, 200), 5.0)  # another frame size, then a gap
        stream.add(noise(2, 64), 60.0)
        assert stream.seen.windows == 2 and stream.seen.tokens <= 2 * whole
        stream.flush()
        assert stream.seen.end_s == pytest.approx(60.5) and stream.seen.windows == 3 and stream.seen.frames == 11
        stream.add(noise(3), 60.6)  # later than the flushed frames, in the same window
        stream.flush()
        assert stream.seen.windows == 4 and stream.seen.tokens <= 3 * whole
        with pytest.raises(UsageError, match="comes after"):
            stream.add(noise(3), 59.0)
        with pytest.raises(UsageError, match="not uint8"):
            stream.add(noise(3).astype(float), 61.0)
        for wrong in (math.nan, math.inf, 1e18):
            with pytest.raises(UsageError, match="not a number of seconds"):
                stream.add(noise(3), wrong)
        with pytest.raises(UsageError, match="has no pixels"):
            stream.add(noise(3)[:0], 61.0)
        with pytest.raises(UsageError, match="nan"):
            stream.add(noise(3), float("nan"))


def test_what_a_stream_refuses(demo):
    qa = VideoQA(demo, budget=0.25)
    for method in ("cdpruner", "fastv", "downscale", "evoprune+fastv"):
        with pytest.raises(UsageError, match="cannot prune a stream"):
            VideoQA(demo, budget=0.25, method=method).stream()
    with pytest.raises(UsageError, match="window_s is 0"):
        qa.stream(window_s=0.0)
    with qa.stream(memory_tokens=3) as stream, pytest.raises(UsageError, match="smaller than two windows"):
        stream.add(noise(0), 0.0)
    with qa.stream(system="Be brief.") as stream:
        with pytest.raises(UsageError, match="the stream has no frames yet"):
            stream.ask(QUESTION)
        stream.add(noise(0), 0.0)
        assert stream.ask(QUESTION).text  # about the unfinished window
        with pytest.raises(UsageError, match="system prompt"):
            str(stream.ask(QUESTION, system="Be long."))
    for closed in (lambda: stream.ask(QUESTION), lambda: stream.add(noise(0), 9.0), stream.flush):
        with pytest.raises(UsageError, match="is closed"):
            closed()


def test_an_answer_that_is_left_unread_does_not_stop_the_stream(demo):
    with fed(VideoQA(demo, budget=0.25).stream(window_s=2.0), 4) as stream:
        left = stream.ask("Describe the video.", max_new_tokens=50, temperature=5.0)
        assert list(islice(left, 1))
        fed(stream, 20, start=4.0)
        assert not waiting(stream) and stream.seen.windows == 12
        with pytest.raises(UsageError, match="went on for too long"):
            str(left)


def test_questions_from_another_thread(demo):
    """Questions are answered while frames are added, and no answer sees a half-read window."""
    with fed(VideoQA(demo, budget=0.25).stream(window_s=2.0, memory_s=20.0), 4) as stream:
        feeding = threading.Thread(target=fed, args=(stream, 20), kwargs={"start": 4.0})
        feeding.start()
        spans = []
        while feeding.is_alive():
            answer = stream.ask(QUESTION, max_new_tokens=4)
            assert answer.text is not None
            spans.append((answer.report.stream["end_s"], answer.report.tokens.visual, answer.report.stream["tokens"]))
        feeding.join()
        stream.catch_up()
        assert spans == sorted(spans, key=lambda span: span[0]) and all(a == b for _, a, b in spans)
        assert stream.seen.end_s == 24.0


@pytest.mark.parametrize("closes", [False, True])
def test_frames_questions_and_errors_come_at_random_times(demo, monkeypatch, closes):
    """The encoder is slow and fails now and then, answers are left unread, and the stream may be closed in the middle."""
    rng = random.Random(int(closes))
    problems, answers = [], []

    def layer():
        time.sleep(rng.choice([0, 0, 0.001]))
        if rng.random() < 0.01:
            raise RuntimeError("the encoder failed")

    def attempt(function):
        try:
            function()
        except RuntimeError as problem:
            assert str(problem) == "the encoder failed"
        except UsageError as problem:
            assert "another question" in problem.message or (closes and "is closed" in problem.message)

    def feed():
        for number in range(2, 40):
            attempt(lambda number=number: stream.add(noise(number, 56), number / 2))
            if rng.random() < 0.2:
                attempt(stream.flush if rng.random() < 0.5 else stream.catch_up)

    def ask():
        answer = stream.ask(QUESTION, max_new_tokens=6, temperature=3.0)
        pieces = list(islice(answer, rng.choice([0, 1, 9])))
        if rng.random() < 0.5:
            answer.close()
        if pieces:
            answers.append(answer.report)

    def run(function):
        try:
            function()
        except BaseException as problem:
            problems.append(problem)

    def keep_asking():
        while threads[0].is_alive():
            attempt(ask)

    stream = fed(VideoQA(demo, budget=0.25).stream(window_s=1.0, memory_s=60.0), 1)
    watch_encoder(monkeypatch, layer)
    threads = [threading.Thread(target=run, args=(each,), daemon=True) for each in (feed, keep_asking, keep_asking)]
    for thread in threads:
        thread.start()
    if closes:
        time.sleep(0.1)
        stream.close()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not problems
    assert all(each.tokens.visual == each.stream["tokens"] for each in answers)
    if not closes:
        monkeypatch.undo()
        assert stream.ask(QUESTION, max_new_tokens=1).text is not None
        stream.flush()
        stream.catch_up()
        assert not waiting(stream) and stream.seen.windows > 5 and len(answers) > 1
        stream.close()


def test_the_encoder_waits_while_a_question_is_read(demo, monkeypatch):
    layers, reads, goes_on = [], threading.Event(), threading.Event()
    prefill = LanguageModel.prefill

    def slow(*given, **options):
        reads.set()
        assert goes_on.wait(10)
        return prefill(*given, **options)

    with fed(VideoQA(demo, budget=0.25).stream(window_s=2.0), 2) as stream:
        watch_encoder(monkeypatch, lambda: layers.append(1))
        monkeypatch.setattr(LanguageModel, "prefill", slow)
        asking = threading.Thread(target=lambda: stream.ask(QUESTION, max_new_tokens=2).text)
        feeding = threading.Thread(target=fed, args=(stream, 2), kwargs={"start": 2.0})
        asking.start()
        assert reads.wait(10)
        feeding.start()
        until = time.monotonic() + 10
        while not layers and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(layers) == 1 and stream.seen.windows == 1  # no further layer ran
        goes_on.set()
        asking.join(30)
        feeding.join(30)
        stream.catch_up()
        assert len(layers) > 4 and stream.seen.windows == 2


@pytest.mark.parametrize("model", ["demo", "qwen3_5"])
def test_a_window_that_a_question_interrupts_is_read_later(model, monkeypatch, request):
    qa = VideoQA(request.getfixturevalue(model), budget=0.25)
    usual, layers = Gate.give_way, []

    def give_way(gate):
        layers.append(1)
        if len(layers) == 3:  # as if a question came now
            raise GiveWay
        usual(gate)

    with fed(qa.stream(window_s=2.0), 4) as broken, fed(qa.stream(window_s=2.0), 4) as whole:
        fed(whole, 2, start=4.0)
        monkeypatch.setattr(Gate, "give_way", give_way)
        fed(broken, 2, start=4.0)
        assert waiting(broken) == 1 and broken.seen.windows == 2 and len(layers) == 3
        broken.catch_up()
        assert not waiting(broken) and broken.seen == whole.seen
        for a, b in zip(logits(broken), logits(whole), strict=True):
            torch.testing.assert_close(a, b, atol=0.0, rtol=0.0)


def test_what_has_not_changed_since_the_window_before_is_not_encoded_again(demo, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (112, 168, 3), dtype=np.uint8)
    rows, tokens = [], []
    found = watch_encoder(monkeypatch, lambda: None)
    with VideoQA(demo, budget=0.25).stream(window_s=2.0, fps=2.0) as stream:
        for number in range(16):
            frame = picture.copy()
            if 4 <= number < 12:  # a corner of one unit changes with each frame pair
                frame[:28, :28] = 60 + 20 * (number // 2)
            stream.add(frame, number / 2)
            if number % 4 == 3:
                rows.append(found[-1][0].layers[0][1])
                tokens.append(stream.seen.tokens)
        assert stream.ask(QUESTION).text
    assert rows == [24, 2, 2, 1] and tokens == [12, 24, 36, 48]


def test_what_a_window_leaves_to_the_next_one_counts_as_memory(demo, monkeypatch):
    asked = []
    monkeypatch.setattr(Device, "shortage", lambda self, needed: asked.append(needed) or "needs more than there is")
    frame = np.zeros((112, 168, 3), np.uint8)
    with VideoQA(demo, budget=0.25).stream(window_s=2.0, fps=2.0) as stream:
        for _ in range(2):  # the error is repeated
            with pytest.raises(OutOfMemory, match="168x112 pixels needs more"):
                stream.add(frame, 0.0)
        monkeypatch.undo()
        found = watch_encoder(monkeypatch, lambda: None)
        for number in range(8):
            frame[:28, :28] = 30 * number
            stream.add(frame, number / 2)
        held = sum(each.nbytes for each in found[-1][1].keys_values.values())
    assert asked == [2 * held] * 2


@pytest.mark.slow
def test_two_hours():
    """Two simulated hours: memory and answer time stay constant."""
    qa, held, waits = VideoQA(described(load_model("demo"), folder=None), budget=0.25), {}, {}
    pictures = np.random.default_rng(0).integers(0, 256, (64, 112, 168, 3), dtype=np.uint8)
    with qa.stream(memory_s=240.0) as stream:
        for number in range(2 * 7200):
            stream.add(pictures[number * 7 % 64], number / 2)
            if number % 600 == 599:  # every five minutes
                begun = time.perf_counter()
                answer = stream.ask("What happens?", max_new_tokens=1)
                next(answer, None)
                answer.close()
                Device("cpu").reset_peak_memory()  # also returns the memory cached by the C library
                held[number // 2], waits[number // 2] = Device("cpu").memory_in_use()[0], time.perf_counter() - begun
        seen = stream.seen
    first, *later = held.values()
    assert len(later) == 23 and max(later) <= 1.05 * first, held
    assert seen.frames == 14_400 and seen.tokens <= 30 * 48 and 0 < seen.thinned < seen.windows
    assert seen.end_s - seen.start_s > 240.0  # the thinned windows reach further back than the whole ones
    assert np.median(list(waits.values())[-8:]) < 2 * np.median(list(waits.values())[:8]) + 0.05, waits


def test_the_array_of_a_frame_may_be_reused(demo):
    """Frames of the encoder's own size are not scaled, but copied."""
    kept = []
    for reused in (False, True):
        with VideoQA(demo, budget=1.0).stream(window_s=4.0) as stream:
            held = np.empty((112, 112, 3), np.uint8)
            for number in range(8):
                held[:] = noise(number)
                stream.add(held if reused else held.copy(), number / 2)
            kept.append(stream.ask(QUESTION, max_new_tokens=4).ids)
    assert kept[0] == kept[1]
