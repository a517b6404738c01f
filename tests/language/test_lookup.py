import pytest
import torch

from evoprune import VideoQA
from evoprune.language import GenerationOptions, LanguageModel, PrefillState, TokenStream, lookup
from evoprune.language.lookup import DRAFT, NGRAM, REST, Lookup
from tests.backend.cpu.library import compiled, library  # noqa: F401
from tests.language.test_generate import CLIPS, TOKENS, Clip, Steps
from tests.quantized import parameters
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def passes(monkeypatch):
    """The number of tokens in each pass of an answer."""
    counts = []
    forward = LanguageModel.forward

    def counted(self, embeds, *args, **kwargs):
        counts.append(len(embeds))
        return forward(self, embeds, *args, **kwargs)

    monkeypatch.setattr(LanguageModel, "forward", counted)
    return counts


def stream(model, text=None, new=TOKENS, constraint=None, eos=(), **options):
    """Return an answer's tokens. Drafts are looked up in `text`; None drafts nothing."""
    state = Clip(model, *CLIPS[0]).prefill(model)
    if text is not None:
        state.prompt_ids = torch.tensor(text, dtype=torch.int64)
    return TokenStream(state, GenerationOptions(max_new_tokens=new, **options), eos, 0, constraint), state


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen2_vl"])
@pytest.mark.parametrize(("wrong_at", "saved"), [(None, 8), (4, -1), (7, 0)])
def test_an_answer_is_the_same_with_drafts(passes, family, wrong_at, saved):
    model = tiny_model(family=family)
    expected = list(stream(model)[0])
    text = expected.copy()
    if wrong_at:
        text[::wrong_at] = [(token + 1) % 100 for token in text[::wrong_at]]
    plain = len(passes)
    passes.clear()
    answer, state = stream(model, text)
    assert list(answer) == expected and answer.finish_reason == "length"
    assert len(passes) <= plain - saved and max(passes[1:]) == DRAFT + 1
    assert state.cache.length == Clip(model, *CLIPS[0]).prefill(model).cache.length + state.answer_columns
    assert state.cache.ids_from(state.columns)[: TOKENS - 1] == expected[:-1]


def test_near_ties_are_decided_by_a_pass_over_one_token(model, passes, monkeypatch):
    expected = list(stream(model)[0])
    plain = len(passes)
    passes.clear()
    monkeypatch.setattr(lookup, "MIN_TIE", float("inf"))
    seen = []
    monkeypatch.setattr(Lookup, "verified", lambda self, accepted: seen.append(accepted))
    assert list(stream(model, expected)[0]) == expected
    assert passes.count(1) == plain - 1 and len(passes) > plain


def test_the_end_of_an_answer_inside_a_draft(model):
    expected = list(stream(model)[0])
    end = expected[9]
    answer, state = stream(model, expected, eos=[end])
    assert list(answer) == expected[: expected.index(end)] and answer.finish_reason == "stop"
    for new in range(1, 12):
        answer, state = stream(model, expected, new)
        assert list(answer) == expected[:new] and state.answer_columns < max(new, 1) + 1


def test_an_answer_goes_on_after_an_exception(model, monkeypatch):
    expected = list(stream(model)[0])
    answer, _ = stream(model, expected)
    read = PrefillState.read
    failures = iter([True, False, True] + [False] * 100)

    def fails(self, ids):
        failing = next(failures)
        logits = read(self, ids)
        if failing:
            raise KeyboardInterrupt
        return logits

    monkeypatch.setattr(PrefillState, "read", fails)
    tokens = []
    while answer.finish_reason is None:
        try:
            tokens += [token for token in [next(answer, None)] if token is not None]
        except KeyboardInterrupt:
            continue
    assert tokens == expected


def test_a_constraint_holds_inside_a_draft(model):
    allowed = [[token, (token + 1) % 100, (token + 2) % 100] for token in range(20, 40)]
    expected = list(stream(model, None, constraint=Steps(*allowed))[0])
    assert list(stream(model, expected, constraint=Steps(*allowed))[0]) == expected


@pytest.mark.parametrize("options", [{"temperature": 1.0}, {"repetition_penalty": 1.2}, {"logprobs": 0}])
def test_only_greedy_answers_are_drafted(model, passes, options):
    list(stream(model, list(range(100)), **options)[0])
    assert max(passes[1:]) == 1


def test_drafts_follow_the_latest_occurrence():
    made = Lookup(torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 10, 11, 12]), torch.float32)
    assert made.draft([1], 9) == made.draft([1, 2], 9) == []
    assert made.draft([1, 2, 3], 9) == [6, 7, 8] and (NGRAM, DRAFT) == (3, 3)
    assert made.draft([1, 2, 3, 6], 2) == [7, 8]
    assert made.draft([1, 2, 3, 6, 50], 9) == []
    # The answer itself counts too.
    assert made.draft([1, 2, 3, 6, 50, 2, 3, 6], 9) == [50, 2, 3]


def test_nothing_is_drafted_for_a_while_after_a_useless_draft():
    made = Lookup(torch.tensor([7] * 10), torch.float32)
    answer = [7] * 3
    assert made.draft(answer, 9)
    made.verified(0)
    for _ in range(REST - 1):
        answer.append(7)
        assert not made.draft(answer, 9)
    answer.append(7)
    assert made.draft(answer, 9)
    made.verified(1)
    assert made.draft([*answer, 7], 9)


QUESTIONS = [
    {"question": "Describe the video."},
    {"question": "The square is green. The square is green. What colour is the square? The square is"},
    {"question": "List the colours.", "regex": "(green|red|blue)(, (green|red|blue)){9}"},
]


@pytest.mark.few(4)
@pytest.mark.parametrize("quantize", parameters("none", "int8", "int4"))
@pytest.mark.parametrize("given", QUESTIONS, ids=["plain", "repeated", "regex"])
def test_a_model_answers_as_without_drafts(monkeypatch, quantize, given):
    qa = VideoQA.load("demo", quantize=quantize)
    given = given | {"max_new_tokens": 40}

    def answer() -> list[int]:
        encoded = qa.encode("samples/square.mp4")
        # Without an end, the demo model repeats itself.
        monkeypatch.setattr(qa.loaded, "eos_ids", ())
        found = encoded.ask(**given)
        list(found)
        return found.ids

    drafted = answer()
    monkeypatch.setattr(LanguageModel, "can_draft", False)
    assert answer() == drafted and len(drafted) > 15


@pytest.mark.parametrize("quantize", parameters("int8", "int4"))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ties_do_not_matter_where_a_few_tokens_are_computed_exactly(
    compiled,  # noqa: F811
    passes,
    monkeypatch,
    quantize,
    dtype,
):
    qa = VideoQA.load("demo", quantize=quantize, dtype=dtype)
    monkeypatch.setattr(qa.loaded, "eos_ids", ())
    if not LanguageModel(qa.loaded.model).reads_drafts_exactly:
        pytest.skip("this CPU has no fast and exact products of row-major weights")
    monkeypatch.setattr(lookup, "MIN_TIE", float("inf"))

    def answer() -> list[int]:
        passes.clear()
        found = qa.encode("samples/square.mp4").ask(**QUESTIONS[1], max_new_tokens=40)
        list(found)
        return found.ids

    drafted = answer()
    assert max(passes[1:]) > 1 and len(passes) < 30
    monkeypatch.setattr(LanguageModel, "can_draft", False)
    assert answer() == drafted
