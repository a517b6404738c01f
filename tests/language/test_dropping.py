"""Caches of layers that visual tokens have left, and what is decoded from them."""

import pytest
import torch

from evoprune import methods
from evoprune.contrib.inner import PyramidDrop
from evoprune.language import decoder
from evoprune.language.decoder import KVCache
from evoprune.language.generate import TokenStream, Visual, along, dropping_for, embed_prompt, prefill
from evoprune.language.prompt import Place
from evoprune.language.settings import GenerationOptions
from tests.contrib.eager import BEFORE, COLUMNS, DROPPING, GRID, VISUAL, Eager, a_prompt, deep_model, run_method
from tests.contrib.test_inner import rule_of
from tests.language.test_decoder import assert_close

TEXT = COLUMNS - len(VISUAL)


def sizes_of(length=COLUMNS):
    return torch.rand(length, generator=torch.Generator().manual_seed(2)) * 9 + 0.5


def more(count):
    """Columns after a prompt: embeddings and positions."""
    embeds = torch.randn(count, 64, generator=torch.Generator().manual_seed(5))
    return embeds, (torch.arange(count) + 40).expand(3, -1)


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "visipruner", "holitom-inner"])
@pytest.mark.parametrize("sizes", [None, sizes_of()])
def test_decoding_equals_reading_all_of_it_anew(name, sizes):
    """Decoded columns, one at a time, in portions or at once, against a float64 model that bars what left by a mask."""
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
    model, (embeds, positions) = deep_model(), a_prompt()
    ids = torch.zeros(COLUMNS, dtype=torch.int64)
    place = Place((range(BEFORE, BEFORE + len(VISUAL)),))
    visuals = [Visual(place, embeds[VISUAL], torch.arange(len(VISUAL)))]
    prompt, columns = embed_prompt(model, ids, visuals)
    dropping = dropping_for(model, methods.parse(name), 0.25, visuals, [GRID], prompt, columns)
    state = prefill(model, prompt, positions, 60, dropping=dropping)
    room = [keys.shape[2] - 256 for keys, _ in state.cache._layers]
    assert room == list(dropping.columns) and all(a >= b for a, b in zip(room, state.cache.lengths, strict=True))
    assert list(dropping.layers) == [length - TEXT for length in state.cache.lengths]
    tokens = list(TokenStream(model, state, GenerationOptions(4), ()))
    dropping = dropping_for(model, methods.parse(name), 0.25, visuals, [GRID], prompt, columns)
    again = prefill(model, prompt, positions, 60, dropping=dropping)
    assert along(model, again, torch.tensor(tokens)).argmax(-1).tolist() == tokens


@pytest.mark.parametrize("name", DROPPING)
def test_without_a_drop_nothing_changes_bit_for_bit(name):
    model, (embeds, positions) = deep_model(), a_prompt()
    assert methods.parse(name).language_work(8, len(VISUAL), 1.0) is None
    plain = decoder.logits(model, embeds, positions, KVCache(model, COLUMNS))
    visuals = [Visual(Place((range(BEFORE, BEFORE + len(VISUAL)),)), embeds[VISUAL], torch.arange(len(VISUAL)))]
    assert dropping_for(model, methods.parse(name), 1.0, visuals, [GRID], embeds, torch.arange(COLUMNS)) is None
    assert torch.equal(plain, decoder.logits(model, embeds, positions, KVCache(model, COLUMNS)))


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
    cache.crop(0)
    assert cache.lengths == [0] * 8
    assert_close(
        decoder.logits(model, embeds, positions, cache, sizes_of()),
        decoder.logits(model, embeds, positions, KVCache(model, 1), sizes_of()),
    )


def test_tokens_leave_a_prompt_that_begins_the_cache():
    model, (embeds, positions) = deep_model(), a_prompt()
    _, dropping, cache = run_method(model, methods.get("fastv"), embeds, positions, 0.25)
    with pytest.raises(ValueError, match="columns come before"):
        decoder.forward(model, embeds, positions, cache, dropping=dropping)


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


def test_the_same_with_other_numbers_of_threads():
    model, (embeds, positions) = deep_model(), a_prompt()
    before, made = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append([run_method(model, methods.get(name), embeds, positions, 0.25) for name in DROPPING])
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*made, strict=True):
        assert one[1].dropped == two[1].dropped
        assert torch.equal(one[1]._visual, two[1]._visual)
        assert_close(one[0], two[0])


def test_two_inputs_of_one_prompt():
    """Text between them stays; frame pairs count on from one input to the next."""
    model, hidden = deep_model(), 64
    grids, random = [(2, 2, 3), (1, 3, 3)], torch.Generator().manual_seed(4)
    ids = torch.zeros(40, dtype=torch.int64)
    visuals = [
        Visual(Place((range(3, 15),)), torch.randn(6, hidden, generator=random), torch.arange(0, 12, 2)),
        Visual(Place((range(18, 27),)), torch.randn(9, hidden, generator=random), torch.arange(9)),
    ]
    embeds, columns = embed_prompt(model, ids, visuals)
    for name in DROPPING:
        dropping = dropping_for(model, methods.parse(name), 0.2, visuals, grids, embeds, columns)
        assert dropping._pair.tolist() == [0, 0, 0, 1, 1, 1] + [2] * 9
        assert columns[dropping._visual].tolist() == [3, 5, 7, 9, 11, 13, *range(18, 27)]
        state = prefill(model, embeds, columns.expand(3, -1), 60, dropping=dropping)
        assert state.logits.isfinite().all()
        assert dropping.dropped and min(state.cache.lengths) >= len(columns) - 15 + (name != "visipruner")


def test_a_method_sees_where_in_their_frames_tokens_are(monkeypatch):
    """Behind each drop too; of two inputs, each in its own grid, of which some units have been left out before."""
    grids, kept = [(2, 3, 4), (1, 2, 5)], [[0, 3, 5, 10, 13, 18, 23], [1, 4, 6, 9]]
    model, (embeds, positions) = deep_model(), a_prompt()
    visuals = [
        Visual(Place((range(first, end),)), embeds[first : first + len(some)], torch.tensor(some))
        for (first, end), some in zip(((5, 29), (31, 41)), kept, strict=True)
    ]
    there = [  # of each token: the number of its frame pair, and its row and column
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
    prompt, columns = embed_prompt(model, torch.zeros(COLUMNS, dtype=torch.int64), visuals)
    dropping = dropping_for(model, methods.parse("pyramiddrop"), 0.5, visuals, grids, prompt, columns)
    prefill(model, prompt, positions[:, columns], 60, dropping=dropping)
    assert len(seen) == 3
