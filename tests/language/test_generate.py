from functools import cache

import pytest
import tokenizers
import torch
from transformers.generation import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from evoprune.errors import ModelError
from evoprune.language import (
    GenerationOptions,
    LanguageModel,
    Prompt,
    Tokenizer,
    TokenStream,
    prompt_positions,
    prune_prompt,
)
from evoprune.language.sampling import choose, penalized, probabilities
from tests.tiny import encoded_tokens, tiny_model, tiny_tokenizer

TOKENS = 32
# (T, H, W) in merge units, seconds per grid: short, long in time, fractional, a single grid, wide.
CLIPS = [((3, 4, 6), 0.5), ((12, 2, 2), 3.3), ((2, 3, 3), 1.0), ((1, 2, 5), 0.7), ((4, 2, 5), 11.25)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@cache
def own_tokenizer():
    hf = tiny_tokenizer()
    return Tokenizer(tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()), hf.chat_template)


class Clip:
    """A random video with a question: pixels, features, the full prompt and its positions."""

    def __init__(self, model, grid, seconds, question="How many red squares are there?"):
        t, h, w = grid
        self.grid_thw = torch.tensor([[t, 2 * h, 2 * w]])
        self.pixels = torch.randn(t * h * w * 4, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(t + h))
        with torch.no_grad():
            self.features = model.model.visual(self.pixels, grid_thw=self.grid_thw).pooler_output
        self.prompt = Prompt.build(own_tokenizer(), question, [("video", t * h * w)])
        videos = self.prompt.places[0].positions(grid, seconds, 2)
        self.positions = prompt_positions(len(self.prompt.input_ids), videos)
        self.next_position = int(self.positions.max()) + 1

    def embed(self, model, kept):
        tokens = encoded_tokens(self.features[kept], kept)
        return pruned(model, self.prompt, [tokens], self.positions)

    def generate(self, model) -> list[int]:
        length = len(self.prompt.input_ids)
        made = model.generate(
            input_ids=self.prompt.input_ids[None],
            pixel_values_videos=self.pixels,
            video_grid_thw=self.grid_thw,
            position_ids=torch.cat([torch.arange(length)[None], self.positions])[:, None],
            do_sample=False,
            max_new_tokens=TOKENS,
            eos_token_id=-1,
        )
        return made[0, length:].tolist()

    def prefill(self, model, kept=None):
        kept = torch.arange(self.prompt.visual_tokens) if kept is None else kept
        made = self.embed(model, kept)
        assert made.following == self.next_position
        return LanguageModel(model).prefill(made.embeds, made.positions, made.following)


def pruned(model, prompt, read, positions=None):
    return prune_prompt(prompt.input_ids, prompt.places, read, positions, LanguageModel(model).embed)


def greedy(model, state, tokens=TOKENS):
    return list(TokenStream(state, GenerationOptions(max_new_tokens=tokens), []))


@pytest.mark.few(2)
@pytest.mark.parametrize(("grid", "seconds"), CLIPS)
def test_all_tokens_kept_gives_the_tokens_of_transformers(model, grid, seconds):
    clip = Clip(model, grid, seconds)
    expected = clip.generate(model)
    # A model stuck on one token would agree with anything.
    assert len(expected) == TOKENS and len(set(expected)) > TOKENS // 2
    assert greedy(model, clip.prefill(model)) == expected


@pytest.mark.few(4)
@pytest.mark.parametrize(("grid", "seconds"), CLIPS)
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_decoding_on_a_pruned_cache_is_one_forward_pass_without_cache(model, grid, seconds, share):
    clip = Clip(model, grid, seconds)
    n = clip.prompt.visual_tokens
    chosen = torch.randperm(n, generator=torch.Generator().manual_seed(1))[: max(1, round(share * n))]
    kept = chosen.sort().values
    made = clip.embed(model, kept)
    state = clip.prefill(model, kept)
    first_logits = state.logits.clone()
    tokens = greedy(model, state)

    answer = model.get_input_embeddings()(torch.tensor([tokens]))
    after = torch.arange(clip.next_position, clip.next_position + TOKENS).expand(3, -1)
    positions = torch.cat([made.positions, after], dim=1)
    with torch.no_grad():
        hidden = model.model.language_model(
            inputs_embeds=torch.cat([made.embeds[None], answer], dim=1),
            position_ids=torch.cat([torch.arange(positions.shape[1])[None], positions])[:, None],
            use_cache=False,
        ).last_hidden_state
        logits = model.lm_head(hidden[0, len(made) - 1 : -1])
    torch.testing.assert_close(first_logits, logits[0], atol=1e-5, rtol=1e-5)
    assert logits.argmax(-1).tolist() == tokens
    assert len(set(tokens)) > TOKENS // 4


@pytest.mark.parametrize("kept", [[2, 1], [1, 1], [-1, 0], [0, 72], [0, 1, 2]])
def test_impossible_selections_are_refused(model, kept):
    clip = Clip(model, *CLIPS[0])
    with pytest.raises(ValueError, match="visual tokens"):
        pruned(model, clip.prompt, [encoded_tokens(clip.features[:2], kept)])


def test_embedding_a_prompt_with_several_inputs(model):
    prompt = Prompt.build(own_tokenizer(), "Which?", [("video", 5), ("picture", 4), ("video", 3)])
    kept = [torch.tensor([1, 4]), torch.tensor([0]), torch.arange(3)]
    sizes = [None, torch.tensor([4.0]), torch.tensor([1.0, 2.0, 3.0])]
    features = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).split([2, 1, 3])
    read = [encoded_tokens(*each) for each in zip(features, kept, sizes, strict=True)]
    made = pruned(model, prompt, read)
    dropped = [prompt.places[0].runs[0][i] for i in (0, 2, 3)] + list(prompt.places[1].runs[0][1:])
    assert made.columns.tolist() == [i for i in range(len(prompt.input_ids)) if i not in dropped]
    assert torch.equal(made.ids, prompt.input_ids[made.columns])
    of_column = dict(zip(made.columns.tolist(), made.embeds, strict=True))
    at = [place.columns[some].tolist() for place, some in zip(prompt.places, kept, strict=True)]
    assert made.columns[made.visual].tolist() == [column for columns in at for column in columns]
    for tokens, columns in zip(read, at, strict=True):
        assert torch.equal(torch.stack([of_column.pop(i) for i in columns]), tokens.features)
    text = prompt.input_ids[list(of_column)]
    assert torch.equal(torch.stack(list(of_column.values())), model.get_input_embeddings()(text))
    found = dict(zip(made.columns.tolist(), made.sizes.tolist(), strict=True))
    assert [found[i] for i in at[1] + at[2]] == [4, 1, 2, 3]
    assert sum(found.values()) == len(made) - 4 + 10
    alone = Prompt.build(own_tokenizer(), "Which?", [("picture", 5)])
    assert pruned(model, alone, [encoded_tokens(features[0], kept[0])]).sizes is None


def test_a_part_of_a_pruned_prompt_is_what_the_whole_has_there(model):
    prompt = Prompt.build(own_tokenizer(), "Which?", [("video", 6)])
    random = torch.Generator().manual_seed(0)
    tokens = encoded_tokens(
        torch.randn(3, 64, generator=random), [0, 2, 5], torch.rand(3), torch.randn(2, 3, 64, generator=random)
    )
    positions = torch.arange(3 * len(prompt.input_ids)).view(3, -1)
    whole = pruned(model, prompt, [tokens], positions)
    parts = whole[:4], whole[4:]
    assert [len(part) for part in parts] == [4, len(whole) - 4]
    assert {part.following for part in parts} == {whole.following} == {positions.numel()}
    for name, dim in (
        ("ids", 0),
        ("columns", 0),
        ("visual", 0),
        ("sizes", 0),
        ("embeds", 0),
        ("positions", 1),
        ("deepstack", 1),
    ):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim), getattr(whole, name))
    assert (whole.deepstack[:, ~whole.visual] == 0).all()
    assert torch.equal(whole.deepstack[:, whole.visual], tokens.deepstack)


def test_an_answer_ends_at_an_end_token_or_at_its_length(model):
    clip = Clip(model, *CLIPS[0])
    tokens = greedy(model, clip.prefill(model))
    end = tokens[9]
    answer = TokenStream(clip.prefill(model), GenerationOptions(max_new_tokens=TOKENS), [10**6, end])
    assert answer.finish_reason is None
    assert list(answer) == tokens[: tokens.index(end)]
    assert (answer.finish_reason, answer.ids) == ("stop", tokens[: tokens.index(end)])
    assert next(answer, None) is None

    answer = TokenStream(clip.prefill(model), GenerationOptions(max_new_tokens=3), [])
    assert list(answer) == tokens[:3]
    assert answer.finish_reason == "length"


def test_no_forward_pass_runs_for_a_token_nobody_asked_for(model):
    state = Clip(model, *CLIPS[3]).prefill(model)
    length = state.cache.length
    answer = TokenStream(state, GenerationOptions(max_new_tokens=4), [])
    next(answer)
    assert state.cache.length == length
    list(answer)
    assert state.cache.length == length + 3


def test_sampling_depends_on_the_seed_alone_and_next_to_zero_is_greedy(model):
    """A large seed leads to different random numbers than its low 32 bits."""
    clip = Clip(model, *CLIPS[0])

    def drawn(seed=0, **settings):
        return list(TokenStream(clip.prefill(model), GenerationOptions(max_new_tokens=8, **settings), [], seed))

    seeds = (1, 2, 3, 3 + 2**32, 3 + 2**33)
    assert drawn(1, temperature=9.0) == drawn(1, temperature=9.0)
    assert len({tuple(drawn(seed, temperature=9.0)) for seed in seeds}) == len(seeds)
    for close in ({"temperature": 1e-6}, {"temperature": 1.0, "top_p": 1e-6}):
        assert drawn(**close) == greedy(model, clip.prefill(model), 8)


def of_transformers(logits, ids, penalty, temperature, top_k, top_p):
    each = [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    each += [TopKLogitsWarper(top_k)] if top_k else []
    scores = LogitsProcessorList([*each, TopPLogitsWarper(top_p)])(torch.tensor([ids]), logits[None])
    return scores[0].softmax(-1)


@pytest.mark.parametrize(
    "penalty, temperature, top_k, top_p",
    [(1.0, 0.7, 20, 0.8), (1.3, 1.0, 0, 0.9), (0.7, 2.0, 5, 1.0), (1.2, 0.5, 1, 1.0), (1.05, 1.5, 1000, 0.95)],
)
def test_probabilities_are_those_of_transformers(penalty, temperature, top_k, top_p):
    logits, ids = torch.randn(200, generator=torch.Generator().manual_seed(0)) * 3, [3, 5, 5, 199, 17]
    if top_p == 1:  # of equal logits, a nucleus may take any
        logits[50] = logits[51]
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    expected = of_transformers(logits, ids, penalty, temperature, top_k, top_p)
    made = probabilities(penalized(logits, penalty, ids), options)
    assert torch.allclose((made / made.sum()).float(), expected, atol=1e-6)
    drawn = {choose(logits, options, torch.Generator().manual_seed(seed), ids) for seed in range(200)}
    assert drawn <= {*expected.nonzero()[:, 0].tolist()} and (len(drawn) > 1) == bool(expected.max() < 1)


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 5, "repetition_penalty": 1.3}])
def test_log_probabilities_are_those_of_the_raw_logits(model, options):
    clip = Clip(model, *CLIPS[0])

    def stream(**more):
        state = clip.prefill(model)
        state.prompt_ids = clip.prompt.input_ids
        return TokenStream(state, GenerationOptions(max_new_tokens=8, **options, **more), [], seed=3)

    plain, answer = stream(), stream(logprobs=3)
    assert list(answer) == list(plain) and plain.logprobs == []
    logits = clip.prefill(model).logits_along(torch.tensor(answer.ids))
    expected = logits.double().log_softmax(-1)
    for token, made, row in zip(answer.ids, answer.logprobs, expected, strict=True):
        assert made.chosen == pytest.approx(float(row[token]), abs=1e-4)
        values, ids = row.topk(3)
        assert [token for token, _ in made.top] == ids.tolist()
        assert [value for _, value in made.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_an_end_token_has_no_log_probability(model):
    clip = Clip(model, *CLIPS[0])
    tokens = greedy(model, clip.prefill(model))
    answer = TokenStream(clip.prefill(model), GenerationOptions(max_new_tokens=TOKENS, logprobs=0), [tokens[4]])
    assert len(list(answer)) == len(answer.logprobs) == tokens.index(tokens[4])
    assert all(each.top == [] and each.chosen < 0 for each in answer.logprobs)


class Steps:
    """A `TokenConstraint` with a list of allowed ids for each token. Nothing is allowed after the last token."""

    def __init__(self, *allowed: list[int]):
        self._allowed = list(allowed)

    def mask(self, size):
        mask = torch.zeros(size, dtype=torch.bool)
        mask[self._allowed[0]] = True
        return mask

    def advance(self, token):
        assert token in self._allowed.pop(0)

    @property
    def complete(self):
        return not self._allowed


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0}, {"repetition_penalty": 1.5}])
def test_a_constraint_narrows_every_choice(model, options):
    clip = Clip(model, *CLIPS[0])
    allowed = [[7], [20, 30, 40], [50, 60], [70]]

    def stream(new=TOKENS, logprobs=None):
        state = clip.prefill(model)
        state.prompt_ids = clip.prompt.input_ids
        given = GenerationOptions(max_new_tokens=new, logprobs=logprobs, **options)
        return TokenStream(state, given, [], 1, Steps(*allowed))

    answer = stream(logprobs=1)
    assert all(token in ids for token, ids in zip(answer, allowed, strict=True))
    assert answer.finish_reason == "stop" and next(answer, None) is None
    if not options:
        logits = clip.prefill(model).logits_along(torch.tensor(answer.ids))
        assert answer.ids == [ids[int(row[ids].argmax())] for row, ids in zip(logits, allowed, strict=True)]
        assert answer.logprobs[0].chosen < answer.logprobs[0].top[0][1]  # by the raw logits
    whole = stream(len(allowed))
    assert list(whole) and whole.finish_reason == "stop"
    cut = stream(len(allowed) - 1)
    assert list(cut) and cut.finish_reason == "length"


@pytest.mark.parametrize("options", [{}, {"temperature": 5.0}])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_constraint_hides_no_logit_that_is_no_number(model, options, wrong):
    state = Clip(model, *CLIPS[0]).prefill(model)
    state.logits = state.logits.clone()
    state.logits[3] = wrong
    with pytest.raises(ModelError):
        list(TokenStream(state, GenerationOptions(**options), [], 0, Steps([7])))


def test_an_end_may_be_allowed(model):
    answer = TokenStream(Clip(model, *CLIPS[0]).prefill(model), GenerationOptions(), [9], 0, Steps([7], [9]))
    assert (list(answer), answer.finish_reason) == ([7], "stop")
