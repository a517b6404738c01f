"""`generate` and `forward` of a Hugging Face model that prunes, on a processor's inputs.

What a pruned prompt gives is compared with the stock model on the whole prompt in which the dropped columns are masked. Attention
sees the same in both, and the stock model uses none of this project's bookkeeping.
"""

import copy
from functools import partial

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
from tests.prompts import processed
from tests.tiny import tiny_model

ONE = [(5, ("video", 4, 8, 12), 7)]
PROMPTS = {
    "one video": ONE,
    "video first": [(("video", 2, 4, 6), 3)],
    "two videos": [(5, ("video", 4, 8, 12), 3, ("video", 2, 4, 8), 7)],
    "picture and video": [(5, ("image", 8, 8), 2, ("video", 4, 8, 12), 7, ("image", 4, 4), 1)],
    "batch": [(5, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 9, ("video", 1, 4, 4), 2)],
    "long video": [(5, ("video", 8, 4, 4), 7)],  # more frame pairs than units in a row
    "batch with text and a picture": [(5, ("video", 4, 8, 12), 7), (12,), (3, ("image", 4, 8), 4)],
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
    model.generation_config.pad_token_id = 398  # not 0, a token that would not be noticed as padding
    return model


def generated(model, inputs, **settings):
    set_seed(3)
    if "generation_config" not in settings:
        settings = {"max_new_tokens": 8, "do_sample": False} | settings
    return model.generate(**inputs, **settings)


def pruned(model, inputs, budget, positions="host", how=ONCE, **settings):
    with evoprune.EvoPrune(budget=budget, positions=positions, **how)(model) as run:
        return generated(model, inputs, **settings), run


def every_prompt(*families):
    return [
        (family, prompt, side, "greedy")
        for family in families
        for prompt, rows in PROMPTS.items()
        for side in (("left", "right") if len(rows) > 1 else ("left",))
    ]


def every_setting(prompt):
    """The settings of `generate` interact with the padding of a batch, not with the family of the model."""
    return [(FAMILIES[0], prompt, "left", name) for name in SETTINGS if prompt == "one video" or name not in ONE_ROW]


CASES = ("model", "prompt", "side", "settings")
OF_QWEN3 = [
    (EVERY[-1], "two videos", "left", name)
    for name in ("beams", "several samples", "static cache", "no cache", "chunked prefill")
    if name in SETTINGS and len(EVERY) > 2
]


@pytest.mark.few(8)
@pytest.mark.parametrize(CASES, [*every_prompt(*EVERY), *every_setting("batch"), *OF_QWEN3], indirect=["model"])
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
    [(*case, ONCE) for case in [*every_prompt(*EVERY), *every_setting("one video")]]
    + [(*case, BY_SIZE) for case in [*every_prompt(FAMILIES[0]), *every_setting("batch"), *OF_QWEN3]],
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
    assert run.report.pruning.visual_tokens_kept == len(made.kept) < len(made.owner)


def test_pruned_columns_are_not_computed(model):
    """They are gone from the prompt, not masked; also where a batch is padded."""
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    inputs = processed(model, (5, ("video", 4, 8, 12), 7), (4, ("video", 2, 4, 4), 7), (3,))
    try:
        out, run = pruned(model, inputs, 0.25, max_new_tokens=2)
    finally:
        hook.remove()
    assert inputs["input_ids"].shape == (3, 110) and out.shape == (3, 112)
    assert seen == [(3, 14 + 24, 64), (3, 1, 64)]
    assert run.columns.index.shape == (3, 38)


@pytest.mark.full
def test_a_prompt_in_a_padded_batch_gives_the_same_as_alone(model):
    rows = PROMPTS["batch"]
    for budget in (1.0, 0.2):
        inputs = processed(model, *rows)
        out, _ = pruned(model, inputs, budget)
        first = 0
        for row, pieces in enumerate(rows):
            videos = sum(isinstance(piece, tuple) for piece in pieces)
            patches = inputs["video_grid_thw"].prod(-1)
            start, size = int(patches[:first].sum()), int(patches[first : first + videos].sum())
            used = inputs["attention_mask"][row].bool()
            alone = {
                "input_ids": inputs["input_ids"][row, None, used],
                "attention_mask": inputs["attention_mask"][row, None, used],
                "mm_token_type_ids": inputs["mm_token_type_ids"][row, None, used],
                "pixel_values_videos": inputs["pixel_values_videos"][start : start + size],
                "video_grid_thw": inputs["video_grid_thw"][first : first + videos],
            }
            if "second_per_grid_ts" in inputs:
                alone["second_per_grid_ts"] = inputs["second_per_grid_ts"][first : first + videos]
            assert torch.equal(pruned(model, alone, budget)[0][0, -8:], out[row, -8:])
            first += videos


@pytest.mark.full
@pytest.mark.parametrize("left_out", ["mm_token_type_ids", "second_per_grid_ts", "attention_mask"])
@pytest.mark.parametrize("prompt", ["one video", "batch"])
def test_inputs_without_types_seconds_or_mask_are_accepted(model, prompt, left_out):
    """Older ones give no token types, some no seconds; without a mask the model makes its own."""
    inputs = processed(model, *PROMPTS[prompt])
    inputs.pop(left_out, None)
    assert torch.equal(pruned(model, inputs, 1.0)[0], generated(model, inputs))
    assert pruned(model, inputs, 0.2)[0].shape == generated(model, inputs).shape


@pytest.mark.full
@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_min_length_counts_the_whole_prompt(model, budget):
    """A model that wants to end at once, as soon as it may."""
    inputs = processed(model, *ONE)
    length = inputs["input_ids"].shape[1]
    model_ends = [lambda ids, scores: scores + 1e4 * torch.nn.functional.one_hot(torch.tensor(7), scores.shape[1])]
    settings = {"eos_token_id": 7, "logits_processor": LogitsProcessorList(model_ends)}
    for least in (0, length + 4):
        out, _ = pruned(model, inputs, budget, min_length=least, **settings)
        assert out.shape == generated(model, inputs, min_length=least, **settings).shape
        assert out.shape[1] == max(length, least) + 1


@pytest.mark.full
def test_padding_that_is_an_end_token_is_not_masked(model):
    inputs = processed(model, *PROMPTS["batch"])
    del inputs["attention_mask"]
    for end in ({"eos_token_id": [398, 2]}, {"pad_token_id": None, "eos_token_id": 398}, {"pad_token_id": 3}):
        assert torch.equal(pruned(model, inputs, 1.0, **end)[0], generated(model, inputs, **end))


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


@pytest.mark.full
def test_scores_and_logits_of_generate_are_the_same(model):
    inputs = processed(model, *PROMPTS["batch"])
    wish = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "num_beams": 2}
    expected = generated(model, masked(model, inputs, encoded(model, inputs, 0.3)), **wish)
    out, _ = pruned(model, inputs, 0.3, **wish)
    assert torch.equal(out.sequences, expected.sequences) and torch.equal(out.beam_indices, expected.beam_indices)
    for name in ("scores", "logits"):
        for mine, theirs in zip(getattr(out, name), getattr(expected, name), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    scores = [model.compute_transition_scores(x.sequences, x.scores, x.beam_indices) for x in (out, expected)]
    torch.testing.assert_close(*scores, atol=1e-4, rtol=1e-4)


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


def test_a_streamer_gets_the_whole_prompt_and_then_tokens(model):
    inputs, seen, stock = processed(model, *ONE), Seen(), Seen()
    generated(model, inputs, streamer=stock)
    pruned(model, inputs, 1.0, streamer=seen)
    assert len(seen.ids) == len(stock.ids) == 10 and seen.ids[-1] is stock.ids[-1] is None
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(seen.ids[:-1], stock.ids[:-1], strict=True))
    pruned(model, inputs, 0.2, streamer=(short := Seen()))
    assert torch.equal(short.ids[0], inputs["input_ids"])


@pytest.mark.full
@pytest.mark.parametrize("prompt", ["one video", "batch", "long video"])
def test_qwens_positions_are_those_counted_by_hand(model, prompt):
    """The same on the whole prompt, at positions counted by hand."""
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
    # Without a clock the two rules differ only where a video has more frame pairs than units in a row.
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
    """Two turns on one cache, the second with all ids and a mask for them; or with the new ids only."""
    first = generated(model, inputs, return_dict_in_generate=True, **settings)
    ids = torch.cat([first.sequences, further], 1)
    more = torch.ones(len(ids), ids.shape[1] - inputs["attention_mask"].shape[1], dtype=torch.int64)
    mask = torch.cat([inputs["attention_mask"].repeat_interleave(len(ids) // len(inputs["input_ids"]), 0), more], 1)
    return first, ids, mask


def test_a_cache_that_was_made_without_pruning_goes_on_while_the_model_prunes(model):
    inputs, further = processed(model, *PROMPTS["batch"]), torch.arange(10, 16)
    first, ids, mask = talk(model, inputs, further.expand(len(inputs["input_ids"]), -1))
    kept, second = copy.deepcopy(first.past_key_values), {"input_ids": ids, "attention_mask": mask}
    expected = generated(model, second, past_key_values=first.past_key_values)
    with evoprune.EvoPrune(budget=0.2)(model):
        assert torch.equal(generated(model, second, past_key_values=kept), expected)


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
    expected = generated(model, second, past_key_values=first.past_key_values)
    with evoprune.EvoPrune(budget=budget, **ONCE)(model):
        first, ids, mask = talk(model, inputs, further)
        kept = copy.deepcopy(first.past_key_values)
        out = generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
        assert torch.equal(out, expected)
        types = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(mask)], 1)[:, : mask.shape[1]]
        usual = {"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types}
        usual |= {name: inputs[name] for name in inputs if name.endswith("_thw")}
        assert torch.equal(generated(model, usual, past_key_values=copy.deepcopy(kept)), expected)
        # Only what is new, where the mask says how much there was; one token was generated and is not in the cache yet.
        new = ids[:, first.sequences.shape[1] - 1 :]
        out = generated(model, {"input_ids": new, "attention_mask": mask}, past_key_values=kept)
        assert torch.equal(out, torch.cat([new, expected[:, ids.shape[1] :]], 1))
    if budget == 1.0:
        first, ids, mask = talk(model, inputs, further)
        stock = generated(model, {"input_ids": ids, "attention_mask": mask}, past_key_values=first.past_key_values)
        assert torch.equal(stock, expected)


def test_one_cached_prefix_answers_many_questions(model):
    """A prompt is read once, up to the question. Copies of its cache, and one that was cut back, answer like fresh prompts."""
    inputs = processed(model, (5, ("video", 4, 8, 12), 1))
    with evoprune.EvoPrune(budget=0.2)(model), torch.no_grad():
        prefix = model(**inputs, past_key_values=DynamicCache(config=model.config.text_config)).past_key_values
        used = copy.deepcopy(prefix)
        for question in (torch.arange(20, 26), torch.arange(40, 43), torch.arange(30, 35)):
            ids = torch.cat([inputs["input_ids"], question[None]], 1)
            whole = dict(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
            whole["mm_token_type_ids"] = torch.cat(
                [inputs["mm_token_type_ids"], torch.zeros(1, len(question))], 1
            ).long()
            expected = generated(model, whole)
            text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            assert torch.equal(generated(model, text, past_key_values=copy.deepcopy(prefix)), expected)
            assert torch.equal(generated(model, text, past_key_values=used), expected)
            used.crop(prefix.get_seq_length() - used.get_seq_length())


def test_a_cache_that_is_cut_inside_the_prompt_can_go_on(model):
    """Before the last words, which are given again, or others instead; or before the video."""
    inputs = processed(model, (5, ("video", 4, 8, 12), 7))
    ids = inputs["input_ids"]
    with evoprune.EvoPrune(budget=0.2)(model), torch.no_grad():
        expected = generated(model, inputs)
        cache = model(**inputs, use_cache=True).past_key_values
        cache.crop(-3)
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert torch.equal(generated(model, text, past_key_values=copy.deepcopy(cache)), expected)
        other = torch.cat([ids[:, :-3], torch.tensor([[50, 51, 52, 53, 54]])], 1)
        fresh = dict(inputs, input_ids=other, attention_mask=torch.ones_like(other))
        fresh["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
        text = {"input_ids": other, "attention_mask": torch.ones_like(other)}
        assert torch.equal(generated(model, text, past_key_values=copy.deepcopy(cache)), generated(model, fresh))
        cache.crop(5 - cache.get_seq_length())
        other = torch.cat([ids[:, :5], torch.tensor([[50, 51, 52, 53, 54]])], 1)
        text = {"input_ids": other, "attention_mask": torch.ones_like(other)}
        assert torch.equal(generated(model, text, past_key_values=cache), generated(model, text))


def test_a_cache_that_was_emptied_starts_anew(model):
    inputs = processed(model, *ONE)
    text = {"input_ids": torch.arange(10, 30)[None], "attention_mask": torch.ones(1, 20, dtype=torch.int64)}
    cache = StaticCache(model.config.text_config, max_cache_len=200)
    with evoprune.EvoPrune(budget=0.2)(model):
        generated(model, inputs, past_key_values=cache)
        cache.reset()
        first = generated(model, text, past_key_values=cache)
        more = torch.cat([first, torch.tensor([[1, 2, 3]])], 1)
        second = generated(model, {"input_ids": more, "attention_mask": torch.ones_like(more)}, past_key_values=cache)
    assert torch.equal(second, generated(model, {"input_ids": more, "attention_mask": torch.ones_like(more)}))


def loop(model, inputs, steps=6, **given):
    """Greedy decoding by hand."""
    out = model(**inputs, use_cache=True)
    ids = [out.logits[:, -1:].argmax(-1)]
    for step in range(1, steps):
        out = model(
            input_ids=ids[-1],
            past_key_values=out.past_key_values,
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
def test_a_call_returns_logits_and_loss_of_the_columns_left(model, prompt, budget):
    inputs = processed(model, *PROMPTS[prompt], side="right")
    labels = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)
    labels = labels.masked_fill(inputs["attention_mask"] == 0, -100)
    call = masked(model, inputs, encoded(model, inputs, budget))
    call["position_ids"] = call["position_ids"][1:]
    with torch.no_grad():
        expected = model(**call).logits
        with evoprune.EvoPrune(budget=budget, **ONCE)(model) as run:
            out = model(**inputs, labels=labels)
            last = model(**inputs, logits_to_keep=3).logits
            again = model(inputs.pop("input_ids"), inputs.pop("attention_mask"), return_dict=False, **inputs)
    torch.testing.assert_close(again[0], out.logits)
    torch.testing.assert_close(last, out.logits[:, -3:])
    total, tokens = 0.0, 0
    for row, index in enumerate(run.columns.index):
        used = index >= 0
        used[used.clone()] &= call["attention_mask"][row, index[used]] > 0
        torch.testing.assert_close(out.logits[row, used], expected[row, index[used]], atol=1e-4, rtol=1e-4)
        for column, after in zip(index[used][:-1], index[used][1:], strict=True):
            if labels[row, after] >= 0:
                total -= float(expected[row, column].log_softmax(-1)[labels[row, after]])
                tokens += 1
    assert out.loss.item() == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.full
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_language_model_can_be_trained(checkpointing):
    model = tiny_model().train()
    model.model.visual.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable()
    inputs = processed(model, *PROMPTS["batch"])
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["mm_token_type_ids"] > 0, -100)

    def gradients():
        model.zero_grad()
        model(**inputs).loss.backward()
        return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}

    expected = gradients()
    with evoprune.EvoPrune(budget=1.0)(model):
        mine = gradients()
    with evoprune.EvoPrune(budget=0.2)(model):
        fewer = gradients()
    assert mine.keys() == expected.keys() == fewer.keys() and len(mine) > 20
    for name, gradient in mine.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3)


def test_a_tower_in_training_is_refused():
    model = tiny_model().train()
    inputs = processed(model, *ONE)
    with evoprune.EvoPrune(budget=0.2)(model):
        with pytest.raises(evoprune.UsageError, match="no gradients") as caught:
            model(**inputs)
        assert "requires_grad_(False)" in caught.value.hint
        generated(model, inputs)
        model.eval()
        with pytest.raises(evoprune.UsageError, match="no gradients"):
            model(**inputs | {"pixel_values_videos": inputs["pixel_values_videos"].requires_grad_()})


@pytest.mark.full
def test_attention_that_takes_no_mask_of_numbers_weighs_every_token_as_one(model, monkeypatch):
    inputs = processed(model, *PROMPTS["batch"])
    by_size, once = pruned(model, inputs, 0.2, how=BY_SIZE)[0], pruned(model, inputs, 0.2)[0]
    monkeypatch.setattr(model.config.text_config, "_attn_implementation", "other")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "other", ALL_ATTENTION_FUNCTIONS["sdpa"])
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "other", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    assert torch.equal(pruned(model, inputs, 0.2, how=BY_SIZE)[0], once) and not torch.equal(by_size, once)


def test_calls_without_a_video_are_the_models_own(model):
    inputs = processed(model, (4, ("image", 8, 8), 5))
    text = {"input_ids": torch.arange(10, 30)[None]}
    expected = [generated(model, x) for x in (inputs, text)]
    with evoprune.EvoPrune(budget=0.1)(model) as run:
        made = [generated(model, x) for x in (inputs, text)]
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))
    assert run.columns is None and run.report.pruning.visual_tokens_in is None


def test_a_context_that_was_not_entered_says_so(model):
    run = evoprune.EvoPrune(budget=0.5)(model)
    assert (
        str(run.report)
        == "<Report: empty: pruning is not active: call the model inside `with`, or after evoprune.apply>"
    )
    with run:
        assert str(run.report) == "<Report: empty>"


@pytest.mark.parametrize("directly", [True, False])
def test_the_report_after_a_call_without_a_video_says_why_it_is_empty(model, directly):
    cache, words = DynamicCache(), torch.arange(10, 30)[None]
    with evoprune.EvoPrune(budget=0.5)(model) as run:
        call = model if directly else partial(model.generate, max_new_tokens=2)
        assert str(run.report) == "<Report: empty>"
        model(**processed(model, *PROMPTS["batch"]), past_key_values=cache)
        kept = run.report.pruning.visual_tokens_kept
        model(input_ids=words[:, :1].expand(len(run.columns.index), 1), past_key_values=cache)
        assert run.report.pruning.visual_tokens_kept == kept > 0
        call(input_ids=words)
        assert str(run.report) == "<Report: empty: no video in this call>" and run.columns is None
        call(**processed(model, (4, ("image", 8, 8), 5)))
        assert str(run.report) == "<Report: empty: pictures are not pruned without pictures=True>"
