"""Test `generate` and `forward` of a Hugging Face model that prunes, with inputs from a processor.

The reference is the stock model on the whole prompt, with the dropped columns masked. Attention sees the same columns in both
cases, and the stock model uses none of evoprune's bookkeeping.
"""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    set_seed,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import evoprune
from tests.hf.reference import ONCE, TAKES_ENCODED, encoded, masked, seconds_of, sizes_of, weighed_by
from tests.prompts import CACHE, processed
from tests.tiny import tiny_model

ONE = [(5, ("video", 4, 8, 12), 7)]
PROMPTS = {
    "one video": ONE,
    "video first": [(("video", 2, 4, 6), 3)],
    "two videos": [(5, ("video", 4, 8, 12), 3, ("video", 2, 4, 8), 7)],
    "picture and video": [(5, ("image", 8, 8), 2, ("video", 4, 8, 12), 7, ("image", 4, 4), 1)],
    "batch": [(5, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 9, ("video", 1, 4, 4), 2)],
    "long video": [(5, ("video", 8, 4, 4), 7)],  # more frame pairs than units in a row
    "batch with text and an image": [(5, ("video", 4, 8, 12), 7), (12,), (3, ("image", 4, 8), 4)],
}
SETTINGS = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 0.9, "top_p": 0.9},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "lengths of everything": {"max_new_tokens": None, "max_length": 138, "min_length": 136},
    "config": {"generation_config": GenerationConfig(max_length=138, do_sample=False)},
    "assistant": {"assistant_model": tiny_model(1)},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
}
if TAKES_ENCODED:
    SETTINGS["chunked prefill"] = {"prefill_chunk_size": 16}
ONE_ROW = ("assistant", "prompt lookup")


FAMILIES = ("qwen2_5_vl", "qwen2_vl")
EVERY = FAMILIES + (("qwen3_vl",) if TAKES_ENCODED else ())
BY_SIZE = {}  # a token counts by the size of its cluster


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = tiny_model(family=request.param)
    model.generation_config.pad_token_id = 398  # not 0, because 0 would not be noticed as padding
    return model


def generated(model, inputs, **settings):
    set_seed(3)
    if "generation_config" not in settings:
        settings = {"max_new_tokens": 8, "do_sample": False} | settings
    return model.generate(**inputs, **settings)


def pruned(model, inputs, budget, positions="host", how=ONCE, **settings):
    with evoprune.EvoPrune(budget=budget, positions=positions, **how)(model) as run:
        return generated(model, inputs, **settings), run


CASES = ("model", "prompt", "side", "settings")
OF_PROMPTS = [
    (family, prompt, side, "greedy")
    for family in EVERY
    for prompt, rows in PROMPTS.items()
    for side in ("left", "right")[: len(rows)]
]
# These settings interact with the padding of a batch, not with the family of the model.
OF_SETTINGS = {
    prompt: [(FAMILIES[0], prompt, "left", name) for name in SETTINGS if prompt == "one video" or name not in ONE_ROW]
    for prompt in ("one video", "batch")
}
OF_QWEN3 = [
    (EVERY[-1], "two videos", "left", name)
    for name in ("beams", "several samples", "static cache", "no cache", "chunked prefill")
    if TAKES_ENCODED
]


@pytest.mark.few(4)
@pytest.mark.parametrize(CASES, [*OF_PROMPTS, *OF_SETTINGS["batch"], *OF_QWEN3], indirect=["model"])
def test_full_budget_is_the_models_own(model, prompt, side, settings):
    inputs, settings = processed(model, *PROMPTS[prompt], side=side), SETTINGS[settings]
    expected = generated(model, inputs, **settings)
    out, run = pruned(model, inputs, 1.0, **settings)
    assert torch.equal(out, expected)
    assert run.report.pruning.kept_ratio == 1


@pytest.mark.skipif(TAKES_ENCODED, reason="this transformers prefills videos in chunks")
def test_prefill_in_chunks_is_refused_where_transformers_would_drop_the_video(model):
    inputs = processed(model, *ONE)
    for settings in {"prefill_chunk_size": 16}, {"generation_config": GenerationConfig(prefill_chunk_size=1000)}:
        with pytest.raises(evoprune.UsageError, match="prefill_chunk_size"):
            pruned(model, inputs, 0.2, **settings)


@pytest.mark.few(4)
@pytest.mark.parametrize(
    (*CASES, "how"),
    [(*case, ONCE) for case in [*OF_PROMPTS, *OF_SETTINGS["one video"]]]
    + [
        (*case, BY_SIZE)
        for case in [*(case for case in OF_PROMPTS if case[0] == FAMILIES[0]), *OF_SETTINGS["batch"], *OF_QWEN3]
    ],
    indirect=["model"],
)
def test_pruned_is_the_whole_prompt_with_dropped_columns_masked(model, prompt, side, settings, how):
    inputs, settings = processed(model, *PROMPTS[prompt], side=side), SETTINGS[settings]
    made = encoded(model, inputs, 0.2, how)
    with weighed_by(model, sizes_of(model, inputs, made)):
        expected = generated(model, masked(model, inputs, made), **settings)
    out, run = pruned(model, inputs, 0.2, how=how, **settings)
    assert torch.equal(out, expected)
    prompts = inputs["input_ids"]
    assert torch.equal(out[:: len(out) // len(prompts), : prompts.shape[1]], prompts)
    assert run.report.pruning.visual_tokens_kept == len(made.kept) < len(made.unit_to_row)


@pytest.mark.full
@pytest.mark.parametrize("prompt", ["one video", "batch"])
@pytest.mark.parametrize(
    ("left_out", "ends"),
    [
        ("mm_token_type_ids", {}),
        ("second_per_grid_ts", {}),
        ("attention_mask", {}),
        ("attention_mask", {"pad_token_id": 3}),
        ("attention_mask", {"eos_token_id": [398, 2]}),
        ("attention_mask", {"pad_token_id": None, "eos_token_id": 398}),
    ],
)
def test_inputs_without_types_seconds_or_mask_are_accepted(model, prompt, left_out, ends):
    """Older inputs lack token types or seconds. Without a mask, the model makes its own unless the padding token ends texts."""
    inputs = processed(model, *PROMPTS[prompt])
    inputs.pop(left_out, None)
    assert torch.equal(pruned(model, inputs, 1.0, **ends)[0], generated(model, inputs, **ends))
    assert pruned(model, inputs, 0.2, **ends)[0].shape == generated(model, inputs, **ends).shape


@pytest.mark.full
@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_min_length_counts_the_whole_prompt(model, budget):
    """The model would end immediately if it were allowed to."""
    inputs = processed(model, *ONE)
    length = inputs["input_ids"].shape[1]
    model_ends = [lambda ids, scores: scores + 1e4 * torch.nn.functional.one_hot(torch.tensor(7), scores.shape[1])]
    settings = {"eos_token_id": 7, "logits_processor": LogitsProcessorList(model_ends)}
    for least in (0, length + 4):
        out, _ = pruned(model, inputs, budget, min_length=least, **settings)
        assert out.shape == generated(model, inputs, min_length=least, **settings).shape
        assert out.shape[1] == max(length, least) + 1


def test_seconds_may_be_a_list_and_ids_the_first_argument(model):
    inputs = processed(model, *PROMPTS["two videos"])
    expected, _ = pruned(model, inputs, 0.2)
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"] = inputs["second_per_grid_ts"].tolist()
    ids = inputs.pop("input_ids")
    with evoprune.EvoPrune(budget=0.2, **ONCE)(model):
        assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, **inputs), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("rows", [2, 3, 4])
def test_positions_that_are_given_are_taken(model, rows):
    inputs = processed(model, *ONE)
    ids = inputs["input_ids"]
    plain = torch.arange(ids.shape[1])[None]
    rope, _ = model.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})
    given = {2: plain, 3: 3 * rope, 4: torch.cat([plain[None], 3 * rope])}[rows]
    inputs["position_ids"] = given
    assert torch.equal(pruned(model, inputs, 1.0)[0], generated(model, inputs))
    made = encoded(model, inputs, 0.3)
    expected = masked(model, inputs, made) | {"position_ids": given}
    out, run = pruned(model, inputs, 0.3)
    assert torch.equal(out, generated(model, expected)) and run.report.pruning.positions == "given"


class Seen(LogitsProcessor, StoppingCriteria):
    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        return scores if isinstance(scores, torch.Tensor) else torch.zeros(len(input_ids), dtype=torch.bool)

    def put(self, value):
        self.ids.append(value)

    def end(self):
        self.ids.append(None)


@pytest.mark.parametrize("beams", [1, 3])
def test_processors_and_criteria_see_the_ids_of_the_whole_prompt(model, beams):
    inputs, seen = processed(model, *PROMPTS["batch"]), [Seen() for _ in range(3)]
    settings = {
        "logits_processor": LogitsProcessorList([seen[0]]),
        "stopping_criteria": StoppingCriteriaList([seen[1]]),
        "prefix_allowed_tokens_fn": lambda row, ids: seen[2].ids.append((row, ids)) or list(range(100)),
        "num_beams": beams,
    }
    whole, width = inputs["input_ids"], inputs["input_ids"].shape[1]
    out, _ = pruned(model, inputs, 0.2, **settings)
    for one in seen[:2]:
        assert len(one.ids) == 8
        for step, ids in enumerate(one.ids):
            assert torch.equal(ids[:, :width], whole.repeat_interleave(len(ids) // 2, 0))
            assert ids.shape[1] == width + step + (one is seen[1])
    assert all(torch.equal(ids[:width], whole[row]) for row, ids in seen[2].ids)
    assert [row for row, _ in seen[2].ids[: 2 * beams]] == [0] * beams + [1] * beams
    assert int(out[:, width:].max()) < 100
    assert settings["logits_processor"] == [seen[0]]


@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_a_streamer_gets_the_whole_prompt_and_then_tokens(model, budget):
    inputs, seen = processed(model, *ONE), Seen()
    out, _ = pruned(model, inputs, budget, streamer=seen)
    assert len(seen.ids) == 10 and seen.ids[-1] is None
    assert torch.equal(torch.cat([seen.ids[0][0], *seen.ids[1:-1]]), out[0])


@pytest.mark.full
@pytest.mark.parametrize("prompt", ["one video", "batch", "long video"])
def test_qwens_positions_are_those_counted_by_hand(model, prompt):
    """The reference is the whole prompt, at positions counted by hand."""
    inputs = processed(model, *PROMPTS[prompt], seconds=9.0)
    made = encoded(model, inputs, 0.3)
    call = masked(model, inputs, made)
    timed = "second_per_grid_ts" in inputs  # Qwen2-VL counts frame pairs
    steps = [seconds * 2 if timed else 1 for seconds in seconds_of(inputs)]
    grids, first = inputs["video_grid_thw"].tolist(), 0
    for row, pieces in enumerate(PROMPTS[prompt]):
        at, column = 0, int((inputs["attention_mask"][row] == 0).sum())
        for piece in pieces:
            if isinstance(piece, int):
                call["position_ids"][1:, row, column : column + piece] = torch.arange(at, at + piece)
                at, column = at + piece, column + piece
                continue
            call["position_ids"][1:, row, column] = at
            t, h, w = grids[first]
            for unit in range(t * h * w // 4):
                pair, place = divmod(unit, h * w // 4)
                where = (int(pair * steps[first]), place // (w // 2), place % (w // 2))
                call["position_ids"][1:, row, column + 1 + unit] = torch.tensor(where) + at + 1
            at += 1 + max(int((t - 1) * steps[first]) + 1, h // 2, w // 2)
            column += t * h * w // 4 + 1
            call["position_ids"][1:, row, column] = at
            at, column, first = at + 1, column + 1, first + 1
    out, run = pruned(model, inputs, 0.3, positions="qwen")
    assert torch.equal(out, generated(model, call)) and run.report.pruning.positions == "qwen"
    logits = []
    for positions in ("host", "qwen"):
        with evoprune.EvoPrune(budget=0.3, positions=positions, **ONCE)(model), torch.no_grad():
            logits.append(model(**inputs).logits[:, -1])
    # Without seconds, the two rules only differ if a video has more frame pairs than units in a row.
    assert torch.equal(*logits) == (not timed and prompt != "long video")


@pytest.mark.parametrize("positions", ["host", "qwen"])
def test_seconds_for_a_model_without_a_clock_reach_the_method_alone(positions):
    model = tiny_model(family="qwen2_vl")
    inputs = processed(model, *ONE)
    seconds = {"second_per_grid_ts": torch.tensor([0.25])}
    with evoprune.EvoPrune(budget=1.0, positions=positions)(model) as run, torch.no_grad():
        assert torch.equal(model(**inputs, **seconds).logits, model(**inputs).logits)
        assert run.report.sampling.seconds_per_pair is None
        model.generate(**inputs, **seconds, max_new_tokens=1)
        assert run.report.sampling.seconds_per_pair == 0.25


def talk(model, inputs, further, **settings):
    """Run the first of two turns on one cache. Returns its output, and all ids and the mask for the second turn."""
    first = generated(model, inputs, return_dict_in_generate=True, **settings)
    ids = torch.cat([first.sequences, further], 1)
    more = torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.int64)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(len(ids) // len(inputs["input_ids"]), 0), more], 1)
    return first, ids, mask


def test_a_cache_that_was_made_without_pruning_goes_on_while_the_model_prunes(model):
    inputs, further = processed(model, *PROMPTS["batch"]), torch.arange(10, 16)
    first, ids, mask = talk(model, inputs, further.expand(len(inputs["input_ids"]), -1))
    kept, second = copy.deepcopy(first[CACHE]), {"input_ids": ids, "attention_mask": mask}
    expected = generated(model, second, **{CACHE: first[CACHE]})
    with evoprune.EvoPrune(budget=0.2)(model):
        assert torch.equal(generated(model, second, **{CACHE: kept}), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("prompt", ["batch", "picture and video"])
@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_a_conversation_goes_on_from_the_cache(model, prompt, budget):
    inputs, further = processed(model, *PROMPTS[prompt]), torch.arange(10, 16)
    further = further.expand(len(inputs["input_ids"]), -1)
    made = encoded(model, inputs, budget)
    call = masked(model, inputs, made)
    first, ids, mask = talk(model, call, further)
    delta = model.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})[1]
    numbers = torch.cat([inputs["attention_mask"], mask[:, inputs["attention_mask"].shape[1] :]], 1).cumsum(1) - 1
    second = {"input_ids": ids, "attention_mask": mask, "position_ids": (numbers + delta).expand(3, -1, -1)}
    expected = generated(model, second, **{CACHE: first[CACHE]})
    with evoprune.EvoPrune(budget=budget, **ONCE)(model):
        first, ids, mask = talk(model, inputs, further)
        kept = copy.deepcopy(first[CACHE])
        out = generated(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: first[CACHE]})
        assert torch.equal(out, expected)
        types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(mask)], 1)[:, : mask.shape[1]]
        usual = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
        usual |= {name: inputs[name] for name in inputs if name.endswith("_thw")}
        assert torch.equal(generated(model, usual, **{CACHE: copy.deepcopy(kept)}), expected)
        # Only the new ids; the mask gives the length of the rest. The last generated token is not in the cache yet.
        new = ids[:, first.sequences.shape[1] - 1 :]
        out = generated(model, {"input_ids": new, "attention_mask": mask}, **{CACHE: kept})
        assert torch.equal(out, torch.cat([new, expected[:, ids.shape[1] :]], 1))
    if budget == 1.0:
        first, ids, mask = talk(model, inputs, further)
        stock = generated(model, {"input_ids": ids, "attention_mask": mask}, **{CACHE: first[CACHE]})
        assert torch.equal(stock, expected)


def test_a_cache_that_is_cut_inside_the_prompt_can_go_on(model):
    """The cache is cut before the last words, which are given again or replaced, or before the video."""
    inputs = processed(model, (5, ("video", 4, 8, 12), 7))
    ids, other = inputs["input_ids"], torch.tensor([[50, 51, 52, 53, 54]])

    def text(*parts):
        ids = torch.cat(parts, 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    with evoprune.EvoPrune(budget=0.2)(model), torch.no_grad():
        expected = generated(model, inputs)
        cache = model(**inputs, use_cache=True)[CACHE]
        cache.crop(-3)
        assert torch.equal(generated(model, text(ids), **{CACHE: copy.deepcopy(cache)}), expected)
        types = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
        fresh = generated(model, inputs | text(ids[:, :-3], other) | {"mm_token_type_ids": types})
        again = generated(model, text(ids[:, :-3], other), **{CACHE: copy.deepcopy(cache)})
        assert torch.equal(again, fresh)
        cache.crop(5 - cache.get_seq_length())
        words = text(ids[:, :5], other)
        assert torch.equal(generated(model, words, **{CACHE: cache}), generated(model, words))


@pytest.mark.few(2)
def test_float64_is_that_of_transformers(model):
    model, inputs = copy.deepcopy(model).double(), processed(model, *ONE)
    expected = generated(model, inputs)
    with evoprune.EvoPrune(budget=1.0)(model):
        assert torch.equal(generated(model, inputs), expected)


def test_tokens_of_encode_can_be_used_where_gradients_are_recorded(model):
    inputs = processed(model, *ONE)
    made = evoprune.encode(model, inputs["pixel_values_videos"], inputs["video_grid_thw"], budget=0.5)
    weights = torch.ones(made.features.shape[1], requires_grad=True)
    (made.features * weights).sum().backward()
    torch.testing.assert_close(weights.grad, made.features.sum(0))


def test_a_tower_that_is_partly_offloaded_is_refused(model):
    model, inputs = copy.deepcopy(model), processed(model, *ONE)
    model.model.visual.blocks[1].to("meta")
    with pytest.raises(evoprune.ModelError, match="weights are offloaded"):
        evoprune.encode(model, inputs["pixel_values_videos"], inputs["video_grid_thw"], budget=0.5)


def test_a_cache_that_was_emptied_starts_anew(model):
    inputs, words = processed(model, *ONE), torch.arange(10, 30)[None]
    cache = StaticCache(model.config.text_config, max_cache_len=200)
    with evoprune.EvoPrune(budget=0.2)(model):
        generated(model, inputs, **{CACHE: cache})
        cache.reset()
        first = generated(model, {"input_ids": words}, **{CACHE: cache})
        more = {"input_ids": torch.cat([first, torch.tensor([[1, 2, 3]])], 1)}
        second = generated(model, more, **{CACHE: cache})
    assert torch.equal(second, generated(model, more))


def loop(model, inputs, steps=6, **given):
    """Decode greedily in an explicit loop."""
    out = model(**inputs, use_cache=True)
    ids = [out.logits[:, -1:].argmax(-1)]
    for step in range(1, steps):
        out = model(
            input_ids=ids[-1],
            **{CACHE: out[CACHE]},
            **{name: make(inputs, step) for name, make in given.items()},
        )
        ids.append(out.logits[:, -1:].argmax(-1))
    return torch.cat(ids, 1)


def whole_mask(inputs, step):
    return torch.nn.functional.pad(inputs["attention_mask"], (0, step), value=1)


@pytest.mark.few(3)
@pytest.mark.parametrize("budget", [1.0, 0.2])
@pytest.mark.parametrize("prompt", ["one video", "batch"])
def test_decoding_by_hand_is_the_same(model, prompt, budget):
    inputs = processed(model, *PROMPTS[prompt])
    call = masked(model, inputs, encoded(model, inputs, budget))
    delta = model.model.get_rope_index(**{k: v for k, v in inputs.items() if not k.startswith("pixel")})[1]

    def mask(_, step):
        return torch.nn.functional.pad(call["attention_mask"], (0, step), value=1)

    def at(_, step):
        return (inputs["attention_mask"].sum(1, keepdim=True) + step - 1 + delta).expand(3, -1, -1)

    with torch.no_grad():
        expected = loop(model, call, attention_mask=mask, position_ids=at)
        with evoprune.EvoPrune(budget=budget, **ONCE)(model):
            assert torch.equal(loop(model, inputs, attention_mask=whole_mask), expected)
            if prompt == "one video":
                assert torch.equal(loop(model, inputs), expected)
        if prompt == "one video" and budget == 1.0:
            assert torch.equal(loop(model, inputs), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize("prompt", ["batch", "picture and video"])
@pytest.mark.parametrize("budget", [1.0, 0.2])
@torch.no_grad()
def test_a_call_returns_logits_of_the_columns_left(model, prompt, budget):
    inputs = processed(model, *PROMPTS[prompt], side="right")
    call = masked(model, inputs, encoded(model, inputs, budget))
    call["position_ids"] = call["position_ids"][1:]
    expected = model(**call).logits
    with evoprune.EvoPrune(budget=budget, **ONCE)(model) as run:
        out = model(**inputs).logits
        last = model(**inputs, logits_to_keep=3).logits
        again = model(inputs.pop("input_ids"), inputs.pop("attention_mask"), return_dict=False, **inputs)
    torch.testing.assert_close(again[0], out)
    torch.testing.assert_close(last, out[:, -3:])
    for row, index in enumerate(run.columns.index):
        used = index >= 0
        used[used.clone()] &= call["attention_mask"][row, index[used]] > 0
        torch.testing.assert_close(out[row, used], expected[row, index[used]], atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_attention_that_takes_no_mask_of_numbers_weighs_every_token_as_one(model, monkeypatch):
    inputs = processed(model, *PROMPTS["batch"])
    by_size, once = pruned(model, inputs, 0.2, how=BY_SIZE)[0], pruned(model, inputs, 0.2)[0]
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "other")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "other", ALL_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "other", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    assert torch.equal(pruned(model, inputs, 0.2, how=BY_SIZE)[0], once) and not torch.equal(by_size, once)


@pytest.mark.parametrize("directly", [True, False])
def test_calls_without_a_video_are_the_models_own_and_the_report_says_why_it_is_empty(model, directly):
    def call(**given):
        return model(**given).logits if directly else generated(model, given)

    cache, words, picture = DynamicCache(), torch.arange(10, 30)[None], processed(model, (4, ("image", 8, 8), 5))
    expected = [call(input_ids=words), call(**picture)]
    run = evoprune.EvoPrune(budget=0.5)(model)
    assert "not active: call the model inside `with` or after evoprune.apply" in str(run.report)
    with run:
        assert str(run.report) == "<Report: empty>"
        model(**processed(model, *PROMPTS["batch"]), **{CACHE: cache})
        kept = run.report.pruning.visual_tokens_kept
        model(input_ids=words[:, :1].expand(len(run.columns.index), 1), **{CACHE: cache})
        assert run.report.pruning.visual_tokens_kept == kept > 0
        made = [call(input_ids=words)]
        assert "no video" in str(run.report) and run.columns is None
        made.append(call(**picture))
        assert "without pictures=True" in str(run.report)
    for mine, stock in zip(made, expected, strict=True):
        assert torch.equal(mine, stock)
