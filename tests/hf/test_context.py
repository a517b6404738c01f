"""The context that prunes inside a Hugging Face model: its effect, its error messages, and its complete removal."""

import copy
import functools
import io
import re
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Event, Thread
from types import SimpleNamespace

import pytest
import torch

import evoprune
from evoprune.hf import context
from tests.hf.reference import TAKES_ENCODED
from tests.prompts import CACHE, processed
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = 398
    return model


def generated(model, inputs, **settings):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)


def inputs(*grids):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(sum(t * h * w for t, h, w in grids), 1176, generator=generator), torch.tensor(grids)


@pytest.mark.parametrize("budget", [0.25, 0.9])  # at 0.9 all tokens of the second video are kept, and have no sizes
def test_several_videos_are_pruned_each_on_its_own(model, budget):
    grids = [(2, 10, 14), (1, 4, 4), (3, 6, 18)]
    patches, thw = inputs(*grids)
    patches[280:296] = 0.0
    made = evoprune.encode(model, patches, thw, budget=budget)
    assert not made.flat  # only the second one is
    first_unit = first_row = 0
    for i, (t, h, w) in enumerate(grids):
        start, n = first_unit * 4, t * h * w
        alone = evoprune.encode(model, patches[start : start + n], thw[i : i + 1], budget=budget)
        mine = (made.kept >= first_unit) & (made.kept < first_unit + n // 4)
        assert torch.equal(made.kept[mine] - first_unit, alone.kept)
        torch.testing.assert_close(made.features[mine], alone.features)
        torch.testing.assert_close(made.size[mine], torch.ones(len(alone.kept)) if alone.size is None else alone.size)
        # Evenness is only computed if something is pruned.
        assert (alone.flat, alone.size is None) == ((i, budget) == (1, 0.25), (i, budget) == (1, 0.9))
        assert torch.equal(made.unit_to_row[first_unit : first_unit + n // 4] - first_row, alone.unit_to_row)
        first_unit, first_row = first_unit + n // 4, first_row + len(alone.rows)
    assert sum(made.kept_per_pair) == len(made.kept) and len(made.kept_per_pair) == 6


ONE = (5, ("video", 4, 8, 12), 7)
PATCHES, GRIDS = torch.zeros(32, 1176), torch.tensor([[2, 4, 4]])
ARGUMENTS = {
    "pixel_values_videos are of type list, not floating-point": {"pixels": PATCHES.tolist()},
    r"pixel_values_videos are int64 \[1, 3\]": {"pixels": GRIDS, "grids": PATCHES},
    r"pixel_values_videos are float32 \[32, 588\]": {"pixels": PATCHES[:, :588]},
    r"pixel_values_videos are float32 \[32\]": {"pixels": PATCHES[:, 0]},
    "pixel_values_videos are uint8": {"pixels": PATCHES.byte()},
    "pixel_values_videos contain NaN": {"pixels": PATCHES / 0},
    "28 patches do not fit": {"pixels": PATCHES[:-4]},
    "video_grid_thw is of type list": {"grids": GRIDS.tolist()},
    r"video_grid_thw is float32 \[1, 3\]": {"grids": GRIDS.float()},
    "video_grid_thw is bool": {"grids": GRIDS.bool()},
    r"video_grid_thw is int64 \[3\]": {"grids": GRIDS[0]},
    "is not a list of .T, H, W. with H and W in multiples of 2": {"grids": torch.tensor([[2, 16, 1]])},
    "video_grid_thw .. are not|do not fit": {"grids": GRIDS[:0]},
    "the question is of type str": {"question": "What?"},
    "the question is int64": {"question": torch.tensor([3, 4])},
    r"the question is float32 \[3, 5\], not floating-point \[tokens, 64\]": {"question": torch.zeros(3, 5)},
}


@pytest.mark.parametrize("says", ARGUMENTS)
def test_encode_refuses_what_no_processor_returns(model, says):
    given = {"pixels": PATCHES, "grids": GRIDS} | ARGUMENTS[says]
    with pytest.raises(evoprune.UsageError, match=says) as caught:
        evoprune.encode(model, given.pop("pixels"), given.pop("grids"), **given)
    assert caught.value.hint


def test_encode_keeps_what_the_other_ways_keep_by_default(model):
    assert len(evoprune.encode(model, PATCHES, GRIDS).kept) == 2


def test_encode_gives_the_question_to_methods_that_read_it(model):
    patches, thw = inputs((2, 10, 14))
    with pytest.raises(evoprune.UsageError, match="cdpruner reads the question") as caught:
        evoprune.encode(model, patches, thw, budget=0.25, method="cdpruner")
    assert "pass question=..." in caught.value.hint
    asked = [model.get_input_embeddings()(torch.tensor(ids)) for ids in ([5, 9, 40], [77, 3])]
    kept = [evoprune.encode(model, patches, thw, budget=0.25, method="cdpruner", question=q).kept for q in asked]
    assert [len(each) for each in kept] == [18, 18] and not torch.equal(*kept)


def state(*modules):
    """Return all attributes and weights of modules that a caller can see."""
    attributes = [{name: copy.copy(value) for name, value in vars(module).items()} for module in modules]
    weights = [(name, value.data_ptr(), value.tolist()) for name, value in modules[0].state_dict().items()]
    return attributes, weights


@pytest.mark.parametrize("leaves", ["remove", "with", "error"])
def test_nothing_is_left_behind(leaves):
    model = tiny_model()
    prompt = processed(model, ONE)
    wish = {"max_new_tokens": 4, "do_sample": False}
    expected, logits = model.generate(**prompt, **wish), model(**prompt).logits
    before = state(model, model.model)
    run = evoprune.EvoPrune(budget=0.1)(model)
    with suppress(ZeroDivisionError), run:
        if leaves == "error":
            with pytest.raises(ZeroDivisionError):
                model.generate(**prompt, **wish, prefix_allowed_tokens_fn=lambda *_: 1 / 0)
            assert model(**prompt).logits.shape[1] == run.columns.places < logits.shape[1]  # it still prunes
            raise ZeroDivisionError
        model.generate(**prompt, **wish)
        if leaves == "remove":
            run.remove()
            run.remove()
            assert state(model, model.model) == before
    assert state(model, model.model) == before
    assert torch.equal(model(**prompt).logits, logits) and torch.equal(model.generate(**prompt, **wish), expected)


def test_a_forward_that_was_replaced_before_comes_back(model):
    """Accelerate and other libraries replace `forward` of a model."""
    stock, calls = model.forward, []

    @functools.wraps(stock)
    def counting(*args, **kwargs):
        calls.append(1)
        return stock(*args, **kwargs)

    prompt = processed(model, (5, ("video", 4, 8, 12), 7))
    model.forward = counting
    try:
        with evoprune.EvoPrune(budget=0.1)(model):
            model.generate(**prompt, max_new_tokens=4, do_sample=False)
            assert len(calls) == 4
        assert model.forward is counting
    finally:
        del model.forward


def test_pruning_a_model_twice_is_refused(model):
    with evoprune.EvoPrune(budget=0.5)(model) as run:
        for again in (lambda: evoprune.apply(model), lambda: evoprune.EvoPrune()(model).__enter__()):
            with pytest.raises(evoprune.UsageError, match="already pruned") as caught:
                again()
            assert "evoprune.remove(model)" in caught.value.hint and "at its start" in caught.value.hint
        with run:  # the same one
            pass
        assert "generate" not in vars(model)
    handle = evoprune.apply(model)
    pruning, model.forward = model.forward, functools.wraps(model.forward)(lambda *a, **k: None)
    with pytest.raises(evoprune.UsageError, match="already pruned"):
        evoprune.apply(model)
    model.forward = pruning
    handle.remove()
    assert not {"forward", "generate"} & vars(model).keys()


def test_pruning_that_nobody_holds_can_be_removed(model):
    evoprune.apply(model)
    own = functools.wraps(model.forward)(lambda *a, **k: None)
    model.forward = own
    evoprune.remove(model)
    assert vars(model).pop("forward") is own and "generate" not in vars(model)
    evoprune.remove(model)
    with evoprune.EvoPrune(pack=True)(model) as run:
        evoprune.remove(run)
        assert run._packed is None and "not active" in repr(run)
    assert not {"forward", "generate"} & vars(model).keys()


def test_what_belongs_to_the_model_is_asked_of_the_model(model):
    run = evoprune.EvoPrune()(model)
    with pytest.raises(AttributeError, match=r"no attribute 'generate'; use model\.generate"):
        run.generate()
    with pytest.raises(TypeError, match="call the model itself"):
        run()
    with pytest.raises(AttributeError, match=r"no attribute 'nope'$"):
        _ = run.nope
    with pytest.raises(AttributeError, match=r"no attribute 'tokens'; did you mean run.report.tokens\?"):
        _ = run.tokens
    assert not hasattr(run, "forward") and hasattr(run, "report")


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: torch.save(model, io.BytesIO())])
def test_copying_a_model_that_prunes_is_refused(model, copied):
    with evoprune.EvoPrune()(model), pytest.raises(evoprune.UsageError, match="copied or pickled"):
        copied(model)


def test_other_models_are_refused():
    namesake = type("Qwen2_5_VLForConditionalGeneration", (torch.nn.Module,), {})()
    for model in (namesake, tiny_model().model, torch.nn.Linear(2, 2), None):
        with pytest.raises(evoprune.ModelError, match="cannot be pruned") as caught:
            evoprune.apply(model)
        assert "Qwen2_5_VLForConditionalGeneration" in caught.value.hint
        with pytest.raises(evoprune.ModelError, match="no vision tower"):
            evoprune.encode(model, *inputs((1, 4, 4)))


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("problem", ["cannot be run: activation gelu", "offloaded"])
def test_a_tower_that_cannot_be_run_is_refused(family, problem):
    model = tiny_model(family=family)
    if problem == "offloaded":
        model.model.visual.to("meta")
    else:
        model.model.visual.config.hidden_act = "gelu"
    with pytest.raises(evoprune.ModelError, match=problem):
        evoprune.apply(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": 0}, "budget"),
        ({"method": "nope"}, "unknown pruning method"),
        ({"method": "subsample"}, "acts on frames"),
        ({"method": "fastv"}, "inside the language model"),
        ({"method": "evoprune+fastv"}, "inside the language model"),
        ({"method": "cdpruner"}, "reads the question"),
        ({"method": "evoprune:nope=1"}, "no setting"),
        ({"positions": "mine"}, "positions"),
    ],
)
def test_settings_are_checked_at_once(settings, message):
    with pytest.raises(evoprune.UsageError, match=message):
        evoprune.EvoPrune(**settings)
    if message != "positions":
        with pytest.raises(evoprune.UsageError, match=message):
            evoprune.encode(None, PATCHES, GRIDS, **settings)


def changed(prompt, **changes):
    return {name: value for name, value in (prompt | changes).items() if value is not None}


PER_COLUMN = ("token_type_ids", "cu_seq_lens_q", "logits_to_keep")  # arguments of `forward` only


def refusals(model, prompt):
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    embeds = model.get_input_embeddings()(ids)
    packed = torch.cat([torch.arange(60), torch.arange(ids.shape[1] - 60)]).expand(4, 1, -1)
    cache = model(input_ids=ids[:, :4])[CACHE]
    video = {"video": SimpleNamespace(pooler_output=[])}
    yield "inputs_embeds", changed(prompt, inputs_embeds=embeds)
    yield "inputs_embeds", changed(prompt, inputs_embeds=embeds, input_ids=None)
    yield "shape .* of attention_mask does not match", changed(prompt, attention_mask=mask[:, :-1])
    yield "shape .* of attention_mask does not match", changed(prompt, attention_mask=mask[:, None, None])
    yield "video tokens, but video_grid_thw needs", changed(prompt, video_grid_thw=prompt["video_grid_thw"][:1])
    yield "video tokens, but video_grid_thw needs", changed(prompt, video_grid_thw=None)
    shorter = {"input_ids": ids[:, :-12], "attention_mask": mask[:, :-12], "mm_token_type_ids": None}
    yield "video tokens, but video_grid_thw needs", changed(prompt, **shorter)
    for token in (model.config.video_token_id, model.config.image_token_id):  # in the question
        more = {"attention_mask": None, "mm_token_type_ids": None}
        with_it = torch.cat([ids[:, :-4], torch.tensor([[token]]), ids[:, -4:]], 1)
        yield "video tokens, but video_grid_thw needs|a run of image tokens", changed(prompt, input_ids=with_it, **more)
    yield "shape .* of labels does not match", changed(prompt, labels=ids[:, -4:], logits_to_keep=4)
    yield "shape .* of shift_labels does not match", changed(prompt, shift_labels=ids[0])
    yield "shape .* of mm_token_type_ids does not match", changed(prompt, mm_token_type_ids=ids[:, 1:])
    yield "mm_token_type_ids is of class list", changed(prompt, mm_token_type_ids=ids.tolist())
    yield "shape .* of position_ids does not match", changed(prompt, position_ids=torch.arange(5)[None])
    yield "input_ids has shape", changed(prompt, input_ids=ids[0], attention_mask=mask[0])
    yield "patches do not fit", changed(prompt, pixel_values_videos=prompt["pixel_values_videos"][:-4])
    yield "second_per_grid_ts", changed(prompt, second_per_grid_ts=torch.ones(3))
    yield "packed", changed(prompt, position_ids=packed)
    yield "a video cannot follow a KV cache", changed(prompt, **{CACHE: cache})
    yield "input_ids is of class list, not a tensor", changed(prompt, input_ids=ids.tolist())
    yield "attention_mask is of class list, not a tensor", changed(prompt, attention_mask=mask.tolist())
    yield "video_grid_thw is of class list", changed(prompt, video_grid_thw=prompt["video_grid_thw"].tolist())
    for name, value in zip(PER_COLUMN, (ids, torch.tensor([0, 110]), torch.arange(3)), strict=True):
        yield name, changed(prompt, **{name: value})
    yield "already encoded", changed(prompt, pixel_values_videos=None, mm_encoder_outputs=video)


def test_what_cannot_be_pruned_is_refused(model):
    prompt = processed(model, (5, ("video", 4, 8, 12), 3, ("video", 2, 4, 4), 7))
    cases = list(refusals(model, prompt))
    with evoprune.EvoPrune(budget=0.25)(model), torch.no_grad():
        for message, call in cases:
            for way in (model,) if message in PER_COLUMN else (model, model.generate):
                with pytest.raises(evoprune.UsageError, match=message) as caught:
                    way(**call)
                assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize("budget", [1.0, 0.25])
@pytest.mark.parametrize("family", ["qwen2_5_vl", *(["qwen3_vl"] if TAKES_ENCODED else [])])
def test_grids_that_do_not_fit_the_prompt_are_refused(family, budget):
    """A matching total of tokens is not enough, because each run has its own grid. Unpruned images are checked too."""
    model = tiny_model(family=family)
    prompt = processed(model, (5, ("image", 8, 8), 2, ("video", 4, 8, 12), 3, ("video", 2, 4, 8), ("image", 4, 4), 1))
    grids, shapes = prompt["video_grid_thw"], prompt["image_grid_thw"]
    cases = {
        r"a run of video tokens .* video_grid_thw: its row is \[": {"video_grid_thw": grids.flip(0)},
        r"a run of image tokens .* image_grid_thw: there is no": {"pixel_values": None, "image_grid_thw": None},
        r"image tokens .*: there is no row": {
            "pixel_values": prompt["pixel_values"][:64],
            "image_grid_thw": shapes[:1],
        },
        r"image tokens .*: its row is \[1, ": {"image_grid_thw": shapes.flip(0)},
    }
    with evoprune.EvoPrune(budget=budget)(model), torch.no_grad():
        for message, changes in cases.items():
            with pytest.raises(evoprune.UsageError, match=message):
                model(**changed(prompt, **changes))
        model(**prompt)


def test_calls_that_cannot_go_on_from_a_pruned_prompt_are_refused(model):
    prompt = processed(model, (5, ("video", 4, 8, 12), 7), (4, ("video", 4, 8, 12), 7))
    ids, mask = prompt["input_ids"], prompt["attention_mask"]
    text = {"input_ids": ids[:, :2], "attention_mask": mask}
    wrong = "110 columns continue a KV cache that represents 110"
    calls = [
        (wrong, text),
        (wrong.replace("110", "50", 1), text | {"attention_mask": mask[:, :50]}),
        ("only text", text | {"pixel_values": torch.zeros(4, 1176)}),
        ("rows continue", {"input_ids": ids[:1, :2]}),
        ("video cannot follow", prompt),
    ]
    with evoprune.EvoPrune(budget=0.25)(model), torch.no_grad():
        cache = model(**prompt, use_cache=True)[CACHE]
        for message, call in calls:
            for way in (model, model.generate):
                with pytest.raises(evoprune.UsageError, match=message):
                    way(**call, **{CACHE: cache})
        cache.crop(-20)
        with pytest.raises(evoprune.UsageError, match="cropped in the middle of a padded batch"):
            model(input_ids=ids[:, :2], **{CACHE: cache})


def test_the_report_counts_tokens_rows_and_times(model):
    prompt = processed(model, (5, ("image", 8, 8), 2, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 2))
    with evoprune.EvoPrune(budget=0.25, method="evoprune", positions="qwen")(model) as run:
        assert run.report.pruning.visual_tokens_in is None
        model.generate(**prompt, max_new_tokens=3)
    report = evoprune.Report.from_json(run.report.to_json())
    pruning, times = report.pruning, report.time_ms
    assert (pruning.visual_tokens_in, pruning.visual_tokens_kept, pruning.kept_ratio) == (96 + 32, 24 + 8, 0.25)
    assert sum(pruning.kept_per_pair) == 32 and len(pruning.kept_per_pair) == 6
    assert (report.tokens.text, report.tokens.visual, report.tokens.prompt) == (14 + 4 + 7, 32 + 16, 73)
    assert [layer for layer, _ in pruning.layers] == [0, 1] and 0 < pruning.encoder_live_share < 1
    assert pruning.encoder_live_share == pytest.approx(sum(rows for _, rows in pruning.layers) / 2 / 128)
    assert 0 < times.encode_prune < times.encode < times.total
    assert (pruning.method, pruning.budget, pruning.positions) == ("evoprune", 0.25, "qwen")
    assert report.sampling.grid_thw is None and report.env.transformers and report.model.dtype == "fp32"
    assert report.model.id == "Qwen2_5_VLForConditionalGeneration"  # it has no name


@pytest.mark.few(1)
@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/guide.md", 2)])
def test_the_documents_run(model, page, count):
    """Runs the code for a Hugging Face model exactly as printed in the documents."""
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.S | re.M)
    prompt = processed(model, (5, ("video", 4, 8, 12), 7))
    names = {"evoprune": evoprune, "model": model, "inputs": prompt}
    names |= {name: prompt[name] for name in ("pixel_values_videos", "video_grid_thw")}
    mine = [block for block in blocks if re.search(r"\bmodel\b", block) and "from_pretrained" not in block]
    assert len(mine) == count
    for block in mine:
        exec(block, names)
    assert names["run"].report.pruning.budget == 0.1 and "generate" not in vars(model)
    assert torch.equal(names["out"][:, :110], prompt["input_ids"])


# Several threads call one model that prunes.


SEVERAL = [
    [(5, ("video", 4, 8, 12), 7)],
    [(3, ("video", 2, 8, 8), 9), (6, ("video", 4, 4, 8), 2)],
    [(4, ("image", 8, 8), 5)],
]


def started(*works):
    """Start one thread per function, all at the same time."""
    begin = Barrier(len(works))

    def run(work):
        begin.wait()
        work()

    threads = [Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    return threads


@pytest.mark.full
@pytest.mark.parametrize("use_cache", [True, False])
def test_each_thread_gets_what_it_gets_alone(model, use_cache):
    batches, made = [processed(model, *prompts) for prompts in SEVERAL] * 3, {}

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
    """A streamer that waits after the first token until `go_on` is set."""

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
    first, second = (processed(model, *prompts) for prompts in SEVERAL[:2])
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
    found, both, refused = context.remover_of, Barrier(2), []

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

    monkeypatch.setattr(context, "remover_of", slow)
    for thread in started(begin, begin):
        thread.join()
    evoprune.remove(model)
    assert refused == ["this model is already pruned"] and not {"generate", "forward"} & vars(model).keys()


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
        # This thread made no call, so it reads the latest report of any thread.
        assert (run.report.pruning.visual_tokens_in, run.columns.places) in seen.values()
        generated(model, batches[0])
        assert run.report.pruning.visual_tokens_in == 8
