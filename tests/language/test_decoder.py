"""Compare the decoder with transformers, with explicit arithmetic, and with itself when a prompt is split differently."""

import itertools
import sys
from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.contrib.pyramiddrop import PyramidDrop
from evoprune.language import LanguageModel, TokenStream, decoder
from evoprune.language.decoder import KVCache
from evoprune.language.prompt import Place, prompt_positions, video_positions
from evoprune.language.pruned import prune_prompt
from evoprune.language.settings import GenerationOptions
from evoprune.model import Config, QwenVL
from tests.contrib.eager import BEFORE, COLUMNS, DROPPING, GRID, VISUAL, Eager, a_prompt, deep_model, run_method
from tests.contrib.test_inner import rule_of
from tests.tiny import encoded_tokens, tiny_config, tiny_model

LENGTH = 60


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def columns(length=LENGTH, seed=0):
    """Return the embeddings, `[L, 64]`, and positions, `[3, L]`, of a prompt that contains a pruned video."""
    positions = prompt_positions(90, [(5, video_positions((5, 3, 4), 1.5, 2))])
    random = torch.Generator().manual_seed(seed)
    kept = torch.randperm(90, generator=random)[:length].sort().values
    return torch.randn(length, 64, generator=random), positions[:, kept]


def fresh(model, embeds, positions):
    return decoder.logits(model, embeds, positions, KVCache(model, len(embeds)))


def hugging_face(model, embeds, positions, mask=None):
    """Return the last column's final hidden state, `[1, hidden]`, and logits, `[1, vocabulary]`, as computed by transformers."""
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=embeds[None],
            position_ids=torch.cat([torch.arange(len(embeds))[None], positions])[:, None],
            attention_mask=None if mask is None else mask[None, None],
            use_cache=False,
        ).last_hidden_state[0, -1:]
        return hidden, model.lm_head(hidden).float()


def assert_close(mine, expected, tolerance=1e-5):
    torch.testing.assert_close(mine, expected, atol=tolerance, rtol=tolerance)


# --- the same numbers ---


@pytest.mark.parametrize("length", [1, 2, 17, LENGTH])
def test_a_pass_is_hugging_faces(model, length):
    embeds, positions = columns(length)
    hidden, logits = hugging_face(model, embeds, positions)
    assert_close(decoder.forward(model, embeds, positions, KVCache(model, 1)), hidden)
    assert_close(fresh(model, embeds, positions), logits)
    for last in {1, length // 2 or 1, length}:
        each = [fresh(model, embeds[:end], positions[:, :end])[0] for end in range(length - last + 1, length + 1)]
        made = decoder.logits(model, embeds, positions, KVCache(model, 1), last=last)
        assert_close(made, torch.stack(each))
    # A model that ignores positions would agree with anything.
    assert not torch.allclose(fresh(model, embeds, positions * 2), logits, atol=1e-2) or length == 1
    again, skeleton = columns(length), QwenVL(Config.parse(tiny_config().to_dict()))
    assert torch.equal(embeds, again[0]) and torch.equal(positions, again[1])  # the inputs are unchanged
    skeleton.load_state_dict(model.state_dict())
    assert torch.equal(fresh(skeleton, embeds, positions), fresh(model, embeds, positions))


@pytest.mark.parametrize("cuts", [[], [20], [20, LENGTH - 1], [LENGTH - 1]])
@pytest.mark.parametrize("strip", [1, 7, 1024])
def test_columns_that_count_more_than_once(model, cuts, strip, monkeypatch):
    """The reference is transformers' model with a custom mask, which is added to the attention scores."""
    monkeypatch.setattr("evoprune.language.attention.STRIP", strip)
    embeds, positions = columns()
    counts = torch.rand(LENGTH, generator=torch.Generator().manual_seed(1)) * 9 + 0.5
    counts[40:] = 1
    mask = counts.log().expand(LENGTH, -1).masked_fill(~torch.ones(LENGTH, LENGTH).tril().bool(), -torch.inf)
    expected = hugging_face(model, embeds, positions, mask)[1]
    cache = KVCache(model, LENGTH)
    for start, end in itertools.pairwise([0, *cuts, LENGTH]):
        of_these = counts[start:end] if start < 40 else None  # the default is once
        made = decoder.logits(model, embeds[start:end], positions[:, start:end], cache, of_these)
    assert_close(made, expected)
    assert not torch.allclose(made, fresh(model, embeds, positions), atol=1e-2)
    ones = decoder.logits(model, embeds, positions, KVCache(model, LENGTH), torch.ones(LENGTH))
    assert_close(ones, fresh(model, embeds, positions))


@pytest.mark.parametrize("cuts", [[], [20], [20, LENGTH - 1]])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_a_bias_in_features_of_heads_is_that_in_a_mask(cuts, dtype, near, monkeypatch):
    model, (embeds, positions) = tiny_model().to(dtype), columns()
    counts = torch.randint(1, 50, (LENGTH,), generator=torch.Generator().manual_seed(1)).float()

    def made():
        cache = KVCache(model, LENGTH)
        for start, end in itertools.pairwise([0, *cuts, LENGTH]):
            given = embeds[start:end].to(dtype), positions[:, start:end], cache, counts[start:end]
            logits = decoder.logits(model, *given)
        return logits

    def with_blind_columns():
        return run_method(deep_model(), methods.get("visipruner"), *a_prompt(), 0.25, sizes_of())[0]

    def lower_right(_, queries, keys, values, scale):
        """Apply a causal mask that is aligned to the lower right corner, as the CUDA kernels do."""
        shapes.append((queries.shape[2:], keys.shape[2:], values.shape[2:]))
        mask = torch.ones(queries.shape[2], keys.shape[2]).tril(keys.shape[2] - queries.shape[2]).bool()
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=scale)

    expected, masked, shapes = made(), with_blind_columns(), []
    monkeypatch.setattr("evoprune.backend.attention.uses_kernels", lambda device: True)
    monkeypatch.setattr("evoprune.backend.attention.Attention.causal", lower_right)
    assert_close(made(), expected, near)
    ends = [end for end in [*cuts, LENGTH] if end != LENGTH or LENGTH - 1 not in cuts]
    # The last column of the top layer, and a single column, use the mask.
    assert [keys for _, keys, _ in shapes] == [(end, 24) for end in ends]
    assert_close(with_blind_columns(), masked)


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_other_groups_of_heads(kv_heads):
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = tiny_config()
    config.text_config.num_key_value_heads = kv_heads
    other = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in other.model.language_model.parameters():
            weight.normal_(0, 0.2, generator=random)
    embeds, positions = columns()
    expected = hugging_face(other, embeds, positions)[1]
    assert_close(fresh(other, embeds, positions), expected)
    cache = KVCache(other, LENGTH)
    for start, end in ((0, 20), (20, LENGTH - 1), (LENGTH - 1, LENGTH)):
        logits = decoder.logits(other, embeds[start:end], positions[:, start:end], cache)
    assert_close(logits, expected)


def test_half_precision_is_as_close_as_its_rounding():
    exact, half = tiny_model(), tiny_model().bfloat16()
    embeds, positions = columns()
    expected = hugging_face(exact, embeds, positions)[1]
    theirs = hugging_face(half, embeds.bfloat16(), positions)[1]
    cache = KVCache(half, 1)
    decoder.logits(half, embeds[:-1].bfloat16(), positions[:, :-1], cache)
    after_others = decoder.logits(half, embeds[-1:].bfloat16(), positions[:, -1:], cache)
    for mine in (fresh(half, embeds.bfloat16(), positions), after_others):
        assert mine.dtype == torch.float32
        assert (mine - theirs).abs().max() < 0.03  # logits reach 3, where bfloat16 neighbors are 0.016 apart
        assert (mine - expected).norm() < 1.2 * (theirs - expected).norm()


# --- the cache ---


@settings(deadline=None, max_examples=20)
@given(cuts=st.sets(st.integers(1, LENGTH - 1), max_size=8), capacity=st.integers(1, LENGTH))
def test_portions_and_capacity_make_no_difference(model, cuts, capacity):
    embeds, positions = columns()
    cache = KVCache(model, capacity)
    ends = [*sorted(cuts), LENGTH]
    for start, end in zip([0, *ends], ends, strict=False):
        logits = decoder.logits(model, embeds[start:end], positions[:, start:end], cache)
        assert cache.length == end <= cache.capacity
    assert_close(logits, fresh(model, embeds, positions))


def test_a_prefix_serves_again_after_a_crop(model):
    embeds, positions = columns()
    expected = fresh(model, embeds, positions)
    cache = KVCache(model, 40)
    decoder.forward(model, embeds[:30], positions[:, :30], cache)
    for seed in (1, 2):
        others, places = columns(25, seed)
        after = decoder.logits(model, others, places + 50, cache)
        joined = torch.cat([embeds[:30], others]), torch.cat([positions[:, :30], places + 50], 1)
        assert_close(after, fresh(model, *joined))
        cache.crop(30)
        assert cache.length == 30
    assert_close(decoder.logits(model, embeds[30:], positions[:, 30:], cache), expected)
    cache.crop(0)
    assert_close(decoder.logits(model, embeds, positions, cache), expected)


@torch.inference_mode()
def test_a_cache_knows_the_tokens_of_its_columns(model):
    embeds, positions = columns(10)
    ids = torch.arange(100, 110)

    def read(cache, start, end, ids=ids):
        given = None if ids is None else ids[start:end]
        decoder.forward(model, embeds[start:end], positions[:, start:end], cache, ids=given)

    cache = KVCache(model, 4)
    read(cache, 0, 6)
    read(cache, 6, 8, None)  # unknown tokens
    read(cache, 8, 10)
    assert cache.ids_from(0) == [100, 101, 102, 103, 104, 105, -1, -1, 108, 109] and cache.ids_from(8) == [108, 109]
    cache.crop(4)
    assert cache.ids_from(0) == [100, 101, 102, 103] and cache.ids_from(5) == []
    read(cache, 8, 10)
    cache.keep(torch.tensor([0, 3, 5]))
    assert cache.ids_from(0) == [100, 103, 109]


def test_room_grows_by_half_and_never_shrinks(model):
    embeds, positions = columns()
    cache, sizes = KVCache(model, 8), []
    for column in range(LENGTH):
        decoder.forward(model, embeds[column : column + 1], positions[:, column : column + 1], cache)
        sizes.append(cache.capacity)
    assert list(dict.fromkeys(sizes)) == [8, 12, 18, 27, 40, 60]
    cache.crop(3)
    assert cache.capacity == 60


@pytest.mark.parametrize("capacity", [4, 200])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("part", ["self_attn.v_proj", "mlp.down_proj"])
def test_a_pass_that_breaks_off_leaves_the_cache_as_it_was(model, capacity, layer, part):
    embeds, positions = columns()
    cache = KVCache(model, capacity)
    decoder.forward(model, embeds[:20], positions[:, :20], cache)
    hook = model.model.language_model.layers[layer].get_submodule(part).register_forward_pre_hook(lambda *_: 1 / 0)
    for end in (21, LENGTH):
        with pytest.raises(ZeroDivisionError):
            decoder.forward(model, torch.ones(end - 20, 64), positions[:, 20:end], cache)
        assert cache.length == 20
    hook.remove()
    logits = decoder.logits(model, embeds[20:], positions[:, 20:], cache)
    assert_close(logits, fresh(model, embeds, positions))


def test_a_signal_leaves_every_layer_with_the_columns_that_the_cache_says(model):
    """KeyboardInterrupt is raised between any two lines of the code that grows or shrinks a cache."""

    def interrupted(function, code, line):
        def trace(frame, event, _):
            if frame.f_code is not code:
                return None
            if event == "line" and frame.f_lineno == line:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with suppress(KeyboardInterrupt):
                function()
        finally:
            sys.settrace(before)

    embeds, positions = columns(30)
    for method in (KVCache.add, KVCache.crop):
        for line in sorted({line for *_, line in method.__code__.co_lines() if line}):
            cache = KVCache(model, LENGTH)
            decoder.forward(model, embeds[:20], positions[:, :20], cache, torch.ones(20))

            def change(cache=cache):
                decoder.forward(model, embeds[20:], positions[:, 20:], cache)
                cache.crop(10)

            interrupted(change, method.__code__, line)
            assert {*cache.lengths, *map(len, cache.sizes)} == {cache.length}, (method, line)


def test_what_is_refused(model):
    embeds, positions = columns(30)
    cache = KVCache(model, 8)
    for last in (0, 31):
        with pytest.raises(ValueError, match=f"last is {last} for 30 columns"):
            decoder.logits(model, embeds, positions, KVCache(model, 30), last=last)
    for length in (1, -1):
        with pytest.raises(ValueError, match="a cache of 0 columns"):
            cache.crop(length)
    for count, shape in ((3, (3, 2)), (3, (4, 3)), (3, (3,)), (0, (3, 0))):
        with pytest.raises(ValueError, match="positions"):
            decoder.forward(model, torch.zeros(count, 64), torch.zeros(shape, dtype=torch.int64), cache)
    assert cache.length == 0


# --- the amount of work ---


def test_the_last_layer_goes_on_with_the_last_column_only(model):
    embeds, positions = columns()
    rows, hooks = {}, []
    for name, module in model.model.language_model.layers.named_modules():
        if isinstance(module, torch.nn.Linear):
            note = lambda _, inputs, name=name: rows.setdefault(name, []).append(len(inputs[0]))  # noqa: E731
            hooks.append(module.register_forward_pre_hook(note))
    cache = KVCache(model, LENGTH)
    decoder.forward(model, embeds[:-9], positions[:, :-9], cache)
    decoder.forward(model, embeds[-9:], positions[:, -9:], cache)
    for hook in hooks:
        hook.remove()
    assert len(rows) == 14
    for name, seen in rows.items():
        every = name.startswith("0.") or name.endswith(("k_proj", "v_proj"))
        assert seen == ([LENGTH - 9, 9] if every else [1, 1]), name


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_computes_the_same(model, dtype):
    there = tiny_model().to("cuda", dtype)
    embeds, positions = columns()
    expected, cache = fresh(model, embeds, positions), KVCache(there, 4)
    for start, end in ((0, 20), (20, LENGTH - 1), (LENGTH - 1, LENGTH)):
        logits = decoder.logits(there, embeds[start:end].to("cuda", dtype), positions[:, start:end], cache)
    assert_close(logits.cpu(), expected, 1e-4 if dtype == torch.float32 else 0.1)


TEXT = COLUMNS - len(VISUAL)


def sizes_of(length=COLUMNS):
    return torch.rand(length, generator=torch.Generator().manual_seed(2)) * 9 + 0.5


def more(count):
    """Return the embeddings and positions of `count` columns after a prompt."""
    embeds = torch.randn(count, 64, generator=torch.Generator().manual_seed(5))
    return embeds, (torch.arange(count) + 40).expand(3, -1)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "visipruner", "holitom-inner"])
@pytest.mark.parametrize("sizes", [None, sizes_of()])
def test_decoding_equals_reading_all_of_it_anew(name, sizes):
    """Columns are decoded one by one, in portions, or all at once. The reference is a float64 model that masks dropped tokens."""
    model, method, (embeds, positions) = deep_model(), methods.get(name), a_prompt()
    after, places = more(5)
    plan = method.drops(8, len(VISUAL), 0.25)
    eager = Eager(model, embeds, positions, sizes)
    eager.run(rule_of(name)[1], plan)
    expected = eager.decoded(after, places)
    for portions in ((1, 1, 1, 1, 1), (5,), (2, 3)):
        _, _, cache = run_method(model, method, embeds, positions, 0.25, sizes)
        lengths, made = list(cache.lengths), []
        for some, where in zip(after.split(portions), places.split(portions, 1), strict=True):
            made.append(decoder.logits(model, some, where, cache, last=len(some)))
        assert cache.length == COLUMNS + 5 and cache.lengths == [length + 5 for length in lengths]
        assert_close(torch.cat(made).double(), expected, 2e-4)


@pytest.mark.parametrize("name", DROPPING)
def test_room_for_the_prompt_and_not_for_what_left(name):
    model, (embeds, positions), method = deep_model(), a_prompt(), methods.MethodChain.parse(name)
    visual = encoded_tokens(embeds[VISUAL], torch.arange(len(VISUAL)), grid=GRID)
    place = Place((range(BEFORE, BEFORE + len(VISUAL)),))
    ids = torch.zeros(COLUMNS, dtype=torch.int64)
    prompt = prune_prompt(ids, [place], [visual], positions, LanguageModel(model).embed)

    def read():
        dropping = LanguageModel(model).dropping_for(method, 0.25, [visual], prompt)
        return dropping, LanguageModel(model).prefill(prompt.embeds, positions, 60, dropping=dropping)

    dropping, state = read()
    room = [keys.shape[2] - 256 for keys, _ in state.cache._layers]
    assert room == list(dropping.columns) and all(a >= b for a, b in zip(room, state.cache.lengths, strict=True))
    assert list(dropping.layers) == [length - TEXT for length in state.cache.lengths]
    tokens = list(TokenStream(state, GenerationOptions(4), ()))
    assert read()[1].logits_along(torch.tensor(tokens)).argmax(-1).tolist() == tokens
    # At the full budget there is no dropping, and nothing changes.
    assert method.language_work(8, len(VISUAL), 1.0) is None
    assert LanguageModel(model).dropping_for(method, 1.0, [visual], prompt) is None


def test_a_cache_that_tokens_have_left_is_cropped_behind_them_only():
    model, (embeds, positions) = deep_model(), a_prompt()
    _, _, cache = run_method(model, methods.get("pyramiddrop"), embeds, positions, 0.25, sizes_of())
    lengths = list(cache.lengths)
    after, places = more(4)
    first = decoder.logits(model, after, places, cache)
    cache.crop(COLUMNS)
    assert cache.lengths == lengths and [len(sizes) for sizes in cache.sizes] == lengths
    assert torch.equal(decoder.logits(model, after, places, cache), first)
    with pytest.raises(ValueError, match="columns"):
        cache.crop(COLUMNS - 1)
    # Dropping tokens requires a prompt at the start of the cache.
    with pytest.raises(ValueError, match="needs an empty cache"):
        run_method(model, methods.get("fastv"), embeds, positions, 0.25, cache=cache)
    cache.crop(0)
    assert cache.lengths == [0] * 8
    assert_close(
        decoder.logits(model, embeds, positions, cache, sizes_of()),
        decoder.logits(model, embeds, positions, KVCache(model, 1), sizes_of()),
    )


@pytest.mark.parametrize("layer", [1, 5])
def test_a_pass_that_breaks_off_between_drops_leaves_the_cache_as_it_was(layer):
    model, (embeds, positions) = deep_model(), a_prompt()
    hook = model.model.language_model.layers[layer].self_attn.v_proj.register_forward_pre_hook(lambda *_: 1 / 0)
    cache = KVCache(model, 1)
    try:
        with pytest.raises(ZeroDivisionError):
            run_method(model, methods.get("pyramiddrop"), embeds, positions, 0.25, cache=cache)
    finally:
        hook.remove()
    assert cache.length == 0 and cache.lengths == [0] * 8


def test_a_method_sees_where_in_their_frames_tokens_are(monkeypatch):
    """This is checked after each drop, for two inputs that have different grids and already lack some units."""
    grids, kept = [(2, 3, 4), (1, 2, 5)], [[0, 3, 5, 10, 13, 18, 23], [1, 4, 6, 9]]
    model, (embeds, positions) = deep_model(), a_prompt()
    places = [Place((range(5, 29),)), Place((range(31, 41),))]
    read = [
        encoded_tokens(embeds[place.runs[0].start :][: len(some)], some, grid=grid)
        for place, some, grid in zip(places, kept, grids, strict=True)
    ]
    there = [  # for each token: the number of its frame pair, and its row and column
        (unit // (height * width) + before, unit // width % height / height, unit % width / width)
        for some, before, (_, height, width) in zip(kept, (0, 2), grids, strict=True)
        for unit in some
    ]
    seen, select = [], PyramidDrop.select

    def watched(self, tokens):
        seen.append(torch.cat([tokens.pair[:, None], tokens.place], 1))
        torch.testing.assert_close(seen[-1], torch.tensor(there))
        found = select(self, tokens)
        there[:] = [there[i] for i in found.kept.tolist()]
        return found

    monkeypatch.setattr(PyramidDrop, "select", watched)
    ids = torch.zeros(COLUMNS, dtype=torch.int64)
    prompt = prune_prompt(ids, places, read, positions, LanguageModel(model).embed)
    dropping = LanguageModel(model).dropping_for(methods.MethodChain.parse("pyramiddrop"), 0.5, read, prompt)
    LanguageModel(model).prefill(prompt.embeds, prompt.positions, 60, dropping=dropping)
    assert len(seen) == 3
