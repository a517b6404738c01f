"""Compare decoding steps with static tensors, both with and without a graph, with the plain decoder."""

import gc
import weakref
from contextlib import contextmanager
from functools import cache

import pytest
import torch

from evoprune.backend import Attention, Device, Quantization, devices, layers
from evoprune.errors import DeviceWarning, ModelError
from evoprune.language import GenerationOptions, LanguageModel, PrefillState, TokenStream, decoder, static
from evoprune.language.prompt import prompt_positions, video_positions
from evoprune.session import load_model
from tests.backend.recorder import Graphs
from tests.language.test_generate import Steps
from tests.tiny import NATIVE, native_model, save_tiny, tiny_model

NEW = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def hosted(tmp_path_factory):
    """Return models that run in transformers: one with recurrent states, one without, and one with experts."""

    def load(family: str):
        folder = save_tiny(tmp_path_factory.mktemp(family), family=family)
        return load_model(str(folder), dtype="fp32", engine="transformers", pack=False).model

    return cache(load)


@pytest.fixture
def graphs(monkeypatch):
    """Use recorded graphs on the CPU, starting with the second token."""
    made = Graphs()
    monkeypatch.setattr(Device, "capture", property(lambda self: made.capture))
    # A recorded graph has only PyTorch's operations.
    monkeypatch.setattr(Quantization, "delta_rule", staticmethod(lambda device, values: None))
    monkeypatch.setattr(static, "PLAIN_TOKENS", 1)
    monkeypatch.setattr(static, "MIN_COLUMNS", 64)
    monkeypatch.setattr(static, "_caches", weakref.WeakKeyDictionary())
    return made


def state_of(model, columns=40, sizes=False, seed=0) -> PrefillState:
    """Return the state after a prompt with a pruned video. If `sizes` is True, its tokens count more than once."""
    positions = prompt_positions(90, [(5, video_positions((5, 3, 4), 1.5, 2))])
    random = torch.Generator().manual_seed(seed)
    kept = torch.randperm(90, generator=random)[:columns].sort().values
    embeds = torch.randn(columns, 64, generator=random).to(model.dtype)
    counts = torch.randint(1, 9, (columns,), generator=random).float() if sizes else None
    return LanguageModel(model).prefill(embeds, positions[:, kept], int(positions.max()) + 1, sizes=counts)


def stream(model, state, new=NEW, end=(), seed=0, **options) -> TokenStream:
    return TokenStream(state, GenerationOptions(max_new_tokens=new, **options), end, seed)


def plainly(model, *args, **options) -> list[int]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "begin", lambda *_: None)
        return list(stream(model, *args, **options))


@pytest.mark.parametrize("problem", [ValueError("a"), RuntimeError("out of memory")])
def test_what_a_constraint_raises_is_no_failure_of_a_graph(model, graphs, problem):
    class Constraint:
        complete, calls = False, 0

        def mask(self, size):
            self.calls += 1
            if self.calls == 4:
                raise problem

        def advance(self, token):
            pass

    constraint = Constraint()
    answer = TokenStream(state_of(model), GenerationOptions(max_new_tokens=NEW), (), 0, constraint)
    with pytest.raises(type(problem)) as caught:
        list(answer)
    assert caught.value is problem and constraint.calls == 4
    assert graphs.captured == 1 and len(list(answer)) == NEW - 3  # a later token continues with the same graph


@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize("family", NATIVE)
def test_a_graph_decodes_the_tokens_of_the_plain_decoder(family, sizes, graphs):
    model = native_model(family=family)
    expected = plainly(model, state_of(model, sizes=sizes))
    answer = stream(model, state_of(model, sizes=sizes))
    assert list(answer) == expected
    assert len(set(expected)) > 1  # a model stuck on one token would agree with anything
    assert (graphs.captured, graphs.replayed) == (1, NEW - 2)  # the first token is the prompt's, the second captures
    assert answer.finish_reason == "length"


@pytest.mark.few(3)
@pytest.mark.parametrize("sizes", [False, True])
@pytest.mark.parametrize(
    ("family", "on_a_cpu"),
    [
        *(("qwen2_5_vl", True), ("qwen3_vl", True), ("qwen3_5", True), ("qwen3_5", False)),
        *(
            ("qwen3_vl_moe", False),
            ("qwen3_5_moe", False),
        ),  # a CPU groups tokens by expert, which no graph can hold
    ],
)
def test_a_graph_runs_modules_of_transformers(family, on_a_cpu, sizes, graphs, hosted, monkeypatch):
    monkeypatch.setattr("evoprune.backend.hosted.is_host", lambda device: on_a_cpu)
    model = hosted(family)
    for number, columns in enumerate((40, 25, 45)):
        expected = plainly(model, state_of(model, columns, sizes, seed=number))
        assert list(stream(model, state_of(model, columns, sizes, seed=number))) == expected
        assert len(set(expected)) > 1
    assert (graphs.captured, graphs.replayed) == (1, 3 * (NEW - 1) - 1)


def test_an_answer_of_transformers_modules_goes_on_after_its_graph(graphs, hosted, monkeypatch):
    model = hosted("qwen3_5")
    expected = [plainly(model, state_of(model, seed=seed)) for seed in (1, 2)]
    one, other = (stream(model, state_of(model, seed=seed)) for seed in (1, 2))
    made = [next(one) for _ in range(4)], [next(other) for _ in range(5)]  # the second takes the cache over
    assert [begun + list(answer) for begun, answer in zip(made, (one, other), strict=True)] == expected
    monkeypatch.setattr(static, "MAX_NEW", 4)
    monkeypatch.setattr(static, "MIN_COLUMNS", 16)
    static._caches.clear()
    assert list(stream(model, state_of(model, 28), new=24)) == plainly(model, state_of(model, 28), new=24)
    assert static._caches[model].read == 64 and graphs.captured == 3


def test_experts_that_are_chosen_on_the_host_have_no_graph(graphs, hosted, monkeypatch):
    model = hosted("qwen3_5_moe")
    monkeypatch.setattr(model.model.language_model.config, "_experts_implementation", "eager")
    list(stream(model, state_of(model)))
    assert graphs.captured == 0


def test_models_that_read_token_ids_have_no_graph(hosted):
    assert not static.can_step(hosted("qwen4_exp"))


def test_quantised_weights_in_buffers_have_no_graph(hosted):
    """Some quantized layers, such as those of GPTQ and AWQ, are not torch linear layers."""
    model = hosted("qwen3_5")
    layer = model.model.language_model.layers[0].mlp
    assert static.can_step(model)
    layer.register_buffer("qweight", torch.zeros(8, 8, dtype=torch.int32))
    assert not static.can_step(model)
    del layer.qweight


@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 0.06)])
def test_the_logits_of_a_step_are_those_of_the_plain_decoder(family, dtype, near):
    model, ids = native_model(family=family).to(dtype), [5, 17, 9, 200]
    state, also = state_of(model, sizes=True), state_of(model, sizes=True)
    with torch.inference_mode():
        steps = static.new_cache(model, 64)
        steps.fill(also.cache, also.next_position, 64)
        for number, token in enumerate(ids):
            position = torch.full((3, 1), state.next_position + number)
            embeds = model.model.language_model.embed_tokens(torch.tensor([token]))
            expected = decoder.logits(model, embeds, position, state.cache)[0]
            steps.token.fill_(token)
            static.step(model, steps)
            torch.testing.assert_close(steps.logits, expected, atol=near, rtol=near)
            assert steps.best.tolist() == [int(steps.logits.argmax()), 1]
    assert (int(steps.column), int(steps.position)) == (44, state.next_position + 4)
    assert also.cache.length == 40


def test_later_answers_use_the_graph_of_the_first(model, graphs):
    for number, (columns, sizes) in enumerate([(40, True), (50, False), (20, True)]):
        expected = plainly(model, state_of(model, columns, sizes, seed=number))
        before = graphs.replayed
        assert list(stream(model, state_of(model, columns, sizes, seed=number))) == expected
        assert graphs.captured == 1
        assert number == 0 or graphs.replayed - before == NEW - 1


def test_what_an_earlier_answer_left_in_the_cache_is_not_read(model, graphs):
    list(stream(model, state_of(model, 45)))
    cache = static._caches[model]
    with torch.inference_mode():
        cache._keys_values[..., 45:, : cache._dim] = torch.nan
    assert list(stream(model, state_of(model, 30))) == plainly(model, state_of(model, 30)) and graphs.captured == 1


def test_a_longer_prompt_has_a_larger_cache_and_a_graph_of_its_own(model, graphs, monkeypatch):
    monkeypatch.setattr(static, "MIN_COLUMNS", 8)
    # Columns of the prompt and the answer, columns that the graph reads, and the number of captures so far
    for columns, read, captured in ((5, 8, 1), (40, 64, 2), (20, 64, 2), (5, 8, 3), (80, 128, 4), (40, 128, 4)):
        expected = plainly(model, state_of(model, columns), new=4)
        assert list(stream(model, state_of(model, columns), new=4)) == expected
        assert (static._caches[model].read, graphs.captured) == (read, captured)
    assert static._caches[model].capacity == 128


def test_an_answer_goes_on_where_its_cache_is_full(model, graphs, monkeypatch):
    monkeypatch.setattr(static, "MAX_NEW", 4)
    monkeypatch.setattr(static, "MIN_COLUMNS", 16)
    expected = plainly(model, state_of(model, 28), new=24)
    assert list(stream(model, state_of(model, 28), new=24)) == expected
    assert static._caches[model].read == 64
    assert graphs.captured == 2


def test_two_answers_at_the_same_time(model, graphs):
    expected = [plainly(model, state_of(model, seed=seed)) for seed in (1, 2)]
    answers = [stream(model, state_of(model, seed=seed)) for seed in (1, 2)]
    made = [[], []]
    for turn in range(NEW):
        for answer, ids in zip(answers, made, strict=True):
            ids.extend(next(answer) for _ in range(1 + turn % 3) if len(ids) < NEW)
    assert made == expected
    assert graphs.replayed > 5


@pytest.mark.parametrize("by_graph", [True, False])
def test_an_answer_that_is_broken_off_goes_on(model, graphs, monkeypatch, by_graph):
    monkeypatch.setattr(static, "PLAIN_TOKENS", 1 if by_graph else NEW)

    class Interrupted:
        """A constraint that is interrupted once, and allows all tokens."""

        complete, calls = False, 0

        def mask(self, size):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt

        def advance(self, token):
            pass

    expected = plainly(model, state_of(model))
    answer = TokenStream(state_of(model), GenerationOptions(max_new_tokens=NEW), (), 0, Interrupted())
    tokens = [next(answer) for _ in range(5)]
    with pytest.raises(KeyboardInterrupt):
        next(answer)
    assert tokens + list(answer) == expected


def test_drawn_tokens(model, graphs):
    how = {"temperature": 1.0, "top_p": 0.9, "seed": 3}
    expected = plainly(model, state_of(model), **how)
    assert list(stream(model, state_of(model), **how)) == expected
    assert expected != plainly(model, state_of(model))
    assert graphs.replayed == NEW - 2


def test_logits_that_are_no_numbers_are_an_error(graphs):
    model = tiny_model()
    answer = stream(model, state_of(model))
    for _ in range(4):
        next(answer)
    with torch.no_grad():
        model.lm_head.weight[7] = torch.nan  # in place: the graph reads the same memory
    with pytest.raises(ModelError, match="in the output of generate"):
        next(answer)


def test_a_short_answer_is_not_captured(model, graphs, monkeypatch):
    monkeypatch.setattr(static, "PLAIN_TOKENS", 4)
    list(stream(model, state_of(model), new=7))
    assert graphs.captured == 0
    list(stream(model, state_of(model), new=8))
    assert (graphs.captured, graphs.replayed) == (1, 3)  # four are plain, one is captured
    list(stream(model, state_of(model), new=3))
    assert graphs.replayed == 5


@pytest.mark.parametrize("reason", ["layers of different lengths", "hooks", "memory"])
def test_what_is_decoded_plainly(graphs, reason, monkeypatch):
    model, calls = tiny_model(), []
    state = state_of(model)
    if reason == "memory":
        # Enough for 64 columns of two layers.
        monkeypatch.setattr(Device, "available_memory", lambda self: 4 * 32 * 1024)
    elif reason == "hooks":
        model.model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    else:
        state.cache.lengths[1] -= 3
    list(stream(model, state))
    assert graphs.captured == 0 and len(calls) == (NEW - 1) * (reason == "hooks")
    if reason == "memory":
        monkeypatch.setattr(Device, "available_memory", lambda self: 4 * 32 * 1024 + 1)
        list(stream(model, state_of(model)))
        assert graphs.captured == 1


def test_a_hook_that_comes_after_a_capture_is_called(graphs):
    model, calls = tiny_model(), []
    list(stream(model, state_of(model)))
    hook = model.model.language_model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: calls.append(1))
    expected, replayed = plainly(model, state_of(model)), graphs.replayed
    assert list(stream(model, state_of(model))) == expected and graphs.replayed == replayed
    assert len(calls) == 2 * NEW
    hook.remove()
    list(stream(model, state_of(model)))
    assert graphs.captured == 1 and graphs.replayed > replayed


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, AttributeError])
@pytest.mark.filterwarnings("error")
def test_a_capture_that_fails_is_said_once_and_tokens_are_decoded_plainly(kind, model, graphs, monkeypatch):
    def fails(function):
        function()
        raise kind("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graphs, "capture", fails)
    expected = plainly(model, state_of(model))
    said = r"without a CUDA graph.*: operation not permitted when stream is capturing$"
    with pytest.warns(DeviceWarning, match=said):
        assert list(stream(model, state_of(model))) == expected
    assert list(stream(model, state_of(model))) == expected


def test_a_model_that_is_gone_leaves_nothing(graphs):
    model = tiny_model()
    list(stream(model, state_of(model)))
    assert len(static._caches) == 1
    static._caches[model].graphs.clear()  # a recorded graph holds the weights
    del model
    gc.collect()
    assert len(static._caches) == 0


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("0", False), ("", False), ("no", False), ("1", True)])
def test_plain_is_a_setting_of_the_environment(value, expected, monkeypatch):
    monkeypatch.delenv("EVOPRUNE_PLAIN", raising=False)
    if value is not None:
        monkeypatch.setenv("EVOPRUNE_PLAIN", value)
    assert devices.wants_plain_pytorch() is expected
    assert Device("cpu").capture is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_of_a_bias(dtype):
    bias = torch.tensor([0.0, 1.0, 40.0, 1000.0]).log()
    made = Attention(torch.device("cpu"), dtype).bias_features(bias, 16)
    assert made.shape == (4, 8) and made.dtype == dtype
    found = made.float().sum(1) / 4
    torch.testing.assert_close(found[1:], bias[1:], atol=1e-4, rtol=1e-4)
    assert found[0].isfinite() and found[0] < -1000


DEVICE = "cuda"


@contextmanager
def decoding(how: str):
    """Choose the way in which tokens are decoded.

    "graph" uses a graph, "step" runs the same steps without a graph, "plain" uses the decoder that also reads prompts, and "old"
    uses this decoder without fused kernels.
    """
    with pytest.MonkeyPatch.context() as patch:
        if how == "old":
            for module in ("decoder", "hybrid"):
                patch.setattr(f"evoprune.language.{module}.kernels_for", lambda device: None)
        if how == "step":
            patch.setattr(devices, "run_and_capture", lambda function, device: function() or function)
        if how in ("plain", "old"):
            patch.setattr(static, "begin", lambda *_: None)
        elif how == "step":
            patch.setattr(static, "_caches", static.WeakKeyDictionary())
        yield


def prompt_state(model, columns: int, sizes: bool = True, seed: int = 0):
    text = model.model.language_model
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 400, (columns,), generator=random)
    counts = torch.randint(1, 9, (columns,), generator=random).float().to(DEVICE) if sizes else None
    with torch.inference_mode():
        embeds = text.embed_tokens(ids.to(DEVICE)).to(text.norm.weight.dtype)
    return LanguageModel(model).prefill(embeds, torch.arange(columns).expand(3, -1), columns, sizes=counts)


def answer(model, columns: int, new: int, **how) -> list[int]:
    return list(TokenStream(prompt_state(model, columns, **how), GenerationOptions(max_new_tokens=new), ()))


@pytest.mark.cuda
@pytest.mark.parametrize("family", NATIVE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joined", [False, True])
def test_a_graph_decodes_the_same_tokens(family, dtype, joined):
    model = native_model(family=family).to(DEVICE, dtype)
    if joined and model.config.text_config.delta_net is None:
        layers.join(model)
    for columns, sizes in ((40, True), (30, False), (600, True), (500, False)):
        made = {}
        for how in ("graph", "step", "plain", "old"):
            with decoding(how):
                made[how] = answer(model, columns, 24, sizes=sizes)
        assert made["graph"] == made["step"]  # the same kernels on the same shapes
        if dtype == torch.float32:
            assert made["graph"] == made["plain"] == made["old"]
    assert list(static._caches[model].graphs) == [1024]


@pytest.mark.cuda
@pytest.mark.filterwarnings("error::evoprune.errors.DeviceWarning")
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_graph_decodes_the_tokens_of_transformers_modules(family, dtype, tmp_path):
    folder = str(save_tiny(tmp_path, family=family))
    model = load_model(folder, engine="transformers", dtype=dtype, device=DEVICE, pack=False).model
    for columns, sizes in ((40, True), (30, False)):
        made = {}
        for how in ("graph", "step"):
            with decoding(how):
                made[how] = answer(model, columns, 24, sizes=sizes)
        assert made["graph"] == made["step"]
    assert static._caches[model].graphs


@pytest.mark.cuda
def test_logits_at_3b():
    """The logits of decoding steps are compared with those of the plain decoder along one answer."""
    model = load_model("Qwen/Qwen2.5-VL-3B-Instruct", load_format="dummy", device=DEVICE, dtype="bf16").model
    with torch.inference_mode():
        state, cache = prompt_state(model, 256), static.new_cache(model, 2048)
        cache.fill(state.cache, state.next_position, 2048)
        for token in answer(model, 256, 16)[:-1]:
            plain = state.read(torch.tensor([token]))[0]
            cache.token.fill_(token)
            static.step(model, cache)
            # In bf16 each of the two has a mean error of about 0.04, and the largest error of 151,936 logits is 4.5 times that.
            assert (cache.logits - plain).abs().max() / plain.std() < 0.4


def test_a_graph_has_the_log_probabilities_of_the_plain_decoder(graphs, model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "begin", lambda *_: None)
        plain = stream(model, state_of(model), logprobs=2)
        list(plain)
    answer = stream(model, state_of(model), logprobs=2)
    assert list(answer) == plain.ids and graphs.replayed
    for made, expected in zip(answer.logprobs, plain.logprobs, strict=True):
        assert made.chosen == pytest.approx(expected.chosen, abs=1e-5)
        assert [token for token, _ in made.top] == [token for token, _ in expected.top]


def test_a_graph_obeys_a_constraint(graphs, model):
    allowed = [[number, 100 + number, 200 + number] for number in range(NEW)]

    def answer():
        return TokenStream(state_of(model), GenerationOptions(max_new_tokens=NEW), (), 0, Steps(*allowed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "begin", lambda *_: None)
        expected = list(answer())
    assert list(answer()) == expected and graphs.replayed == NEW - 2
    assert all(token in ids for token, ids in zip(expected, allowed, strict=True))
