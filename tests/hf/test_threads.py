"""Several threads call one model that prunes."""

from contextlib import suppress
from threading import Barrier, BrokenBarrierError, Event, Thread

import pytest
import torch

import evoprune
from evoprune.hf import context
from tests.prompts import processed
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_model

PROMPTS = [
    [(5, ("video", 4, 8, 12), 7)],
    [(3, ("video", 2, 8, 8), 9), (6, ("video", 4, 4, 8), 2)],
    [(4, ("image", 8, 8), 5)],
]


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = 398
    return model


def started(*works):
    """The threads of these functions, which begin together."""
    begin = Barrier(len(works))

    def run(work):
        begin.wait()
        work()

    threads = [Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    return threads


def generated(model, inputs, **settings):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)


@pytest.mark.few(1)
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_thread_gets_what_it_gets_alone(model, use_cache):
    batches, made = [processed(model, *prompts) for prompts in PROMPTS] * 3, {}

    def work(i):
        with torch.no_grad():
            made[i] = generated(model, batches[i], use_cache=use_cache), model(**batches[i]).logits

    with evoprune.EvoPrune(budget=0.2)(model) as run, torch.no_grad():
        for thread in started(*(lambda i=i: work(i) for i in range(9))):
            thread.join()
        for i, inputs in enumerate(batches):
            out, logits = made[i]
            assert torch.equal(out, generated(model, inputs, use_cache=use_cache))
            torch.testing.assert_close(logits, model(**inputs).logits)
            if "video_grid_thw" in inputs:
                assert logits.shape[1] == run.columns.places < inputs["input_ids"].shape[1]


class Stops:
    """A streamer that waits after the first token until it is told to go on."""

    def __init__(self):
        self.puts, self.arrived, self.go_on = 0, Event(), Event()

    def put(self, _):
        self.puts += 1
        if self.puts == 2:
            self.arrived.set()
            self.go_on.wait(60)

    def end(self):
        pass


def test_a_generate_that_runs_while_others_begin_or_the_pruning_ends_is_not_disturbed(model):
    first, second = (processed(model, *prompts) for prompts in PROMPTS[:2])
    whole, stops, made = generated(model, first), Stops(), []
    with evoprune.EvoPrune(budget=0.2)(model) as run:
        expected, other = generated(model, first), generated(model, second)
        kept = run.report.pruning.visual_tokens_kept
        thread = Thread(target=lambda: made.append(generated(model, first, streamer=stops)))
        thread.start()
        assert stops.arrived.wait(60)
        assert torch.equal(generated(model, second), other)
        assert run.report.pruning.visual_tokens_kept == kept
    assert torch.equal(generated(model, first), whole)
    stops.go_on.set()
    thread.join()
    assert torch.equal(made[0], expected) and not torch.equal(expected, whole)
    assert not {"generate", "forward"} & vars(model).keys()


def test_of_two_threads_that_begin_to_prune_a_model_at_once_one_is_refused(model, monkeypatch):
    found, both, refused = context.end_of, Barrier(2), []

    def slow(*args):
        end = found(*args)
        with suppress(BrokenBarrierError):
            both.wait(0.3)
        return end

    def begin():
        try:
            evoprune.apply(model)
        except evoprune.UsageError as problem:
            refused.append(problem.message)

    monkeypatch.setattr(context, "end_of", slow)
    for thread in started(begin, begin):
        thread.join()
    evoprune.remove(model)
    assert refused == ["this model is pruned already"] and not {"generate", "forward"} & vars(model).keys()


def test_each_thread_reads_the_report_of_its_own_call(model):
    batches, seen = [processed(model, (5, ("video", 2, 4, 4 * n), 7)) for n in (1, 2, 3)], {}
    with evoprune.EvoPrune(budget=0.5)(model) as run:
        called = Barrier(3)

        def work(i):
            generated(model, batches[i])
            called.wait()
            seen[i] = run.report.pruning.visual_tokens_in, run.columns.places

        assert run.report.pruning.visual_tokens_in is None
        for thread in started(*(lambda i=i: work(i) for i in range(3))):
            thread.join()
        assert seen == {i: (8 * (i + 1), 14 + 4 * (i + 1)) for i in range(3)}
        # This thread has made no call: it reads the latest of all.
        assert (run.report.pruning.visual_tokens_in, run.columns.places) in seen.values()
        generated(model, batches[0])
        assert run.report.pruning.visual_tokens_in == 8
