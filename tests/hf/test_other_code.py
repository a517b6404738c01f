"""Test pruning next to other code in the same model: assistants, hooks, compiled functions, accelerate, and extra arguments."""

import copy
import functools
import inspect
import io

import pytest
import torch
from transformers import CompileConfig

import evoprune
from tests.hf.reference import TAKES_ENCODED
from tests.prompts import processed
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_model

ONE = (5, ("video", 4, 8, 12), 7)


@pytest.fixture
def model():
    model = tiny_model()
    model.generation_config.pad_token_id = 398
    return model


def generated(model, inputs, **settings):
    return model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False} | settings)


@pytest.mark.full
@pytest.mark.parametrize("pruned", ["model", "assistant", "both", "both in one model"])
@pytest.mark.parametrize("budget", [1.0, 0.2])
def test_an_assistant_may_be_pruned_too(model, pruned, budget):
    inputs = processed(model, ONE)
    assistant = model if pruned == "both in one model" else tiny_model(1)
    expected = generated(model, inputs)
    if pruned != "assistant":
        with evoprune.EvoPrune(budget=budget)(model):
            expected = generated(model, inputs)
    handles = [evoprune.apply(model, budget=budget)] if pruned != "assistant" else []
    if assistant is not model and pruned != "model":
        handles.append(evoprune.apply(assistant, budget=budget))
    assert torch.equal(generated(model, inputs, assistant_model=assistant), expected)
    if pruned == "both":  # the assistant still prunes on its own
        assert not torch.equal(generated(assistant, inputs), generated(tiny_model(1), inputs)) or budget == 1.0
    for handle in handles:
        handle.remove()


@pytest.mark.full
def test_a_callback_may_call_the_model_for_other_prompts(model):
    """Guidance with a second prompt does this. Those calls are pruned independently, without the cluster sizes of this one."""
    inputs, other = processed(model, ONE), processed(model, (3, ("video", 2, 8, 8), 2), seed=1)
    text, seen = {"input_ids": torch.arange(10, 30)[None]}, []

    def calls(_, scores):
        seen.append((model(**text).logits, model(**other).logits, generated(model, other)))
        return scores

    with evoprune.EvoPrune(budget=0.2)(model) as run, torch.no_grad():
        expected, report = generated(model, inputs), run.report.pruning
        alone = model(**text).logits, model(**other).logits, generated(model, other)
        assert torch.equal(generated(model, inputs, logits_processor=[calls]), expected)
    assert len(seen) == 8 and all(torch.equal(*pair) for each in seen for pair in zip(each, alone, strict=True))
    assert report.visual_tokens_in == 96


@pytest.mark.few(1)
@pytest.mark.parametrize("settings", [{"budget": 1.0}, {"method": "none", "budget": 0.25}])
@pytest.mark.parametrize("with_ids", [True, False])
@torch.no_grad()
def test_where_nothing_is_pruned_embeddings_are_taken(model, settings, with_ids):
    inputs = processed(model, ONE)
    call = inputs | {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    if not with_ids:
        del call["input_ids"]
    ready = torch.ones(call["attention_mask"].shape[1:] * 2, dtype=torch.bool).tril()[None, None]
    known = {name: value for name, value in inputs.items() if not name.startswith("pixel")}
    unusual = [inputs | {"attention_mask": ready, "position_ids": model.model.get_rope_index(**known)[0]}]
    if TAKES_ENCODED:
        video = model.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        unusual.append(known | {"mm_encoder_outputs": {"video": video}})
    last = inputs | {"labels": inputs["input_ids"][:, -4:], "logits_to_keep": 4}
    loss = model(**last).loss
    # The model keeps the position offset of the latest prompt with ids, and uses it for prompts without ids.
    usual, answer, expected = model(**inputs).logits, generated(model, call), model(**call).logits
    with evoprune.EvoPrune(**settings)(model) as run:
        assert torch.equal(model(**call).logits, expected)
        first = model(**call | {"logits_to_keep": torch.arange(3)}).logits
        torch.testing.assert_close(first, expected[:, :3], atol=1e-5, rtol=1e-5)  # a product of fewer rows
        assert torch.equal(generated(model, call), answer)
        for other in unusual:
            torch.testing.assert_close(model(**other).logits, usual, atol=1e-5, rtol=1e-5)
        assert torch.equal(model(**last).loss, loss)
        assert run.columns is None
    with evoprune.EvoPrune(**settings, positions="qwen")(model), pytest.raises(evoprune.UsageError):
        model(**call)  # the model's own code only knows its own positions


def test_hooks_on_the_tower_are_named_in_a_warning(model, recwarn):
    inputs = processed(model, ONE)
    visual = model.model.visual
    with evoprune.EvoPrune(budget=0.2)(model):
        model.enable_input_require_grads()  # registers hooks of transformers
        generated(model, inputs)
        assert not [warning for warning in recwarn if "hooks" in str(warning.message)]
        visual.register_forward_hook(lambda *_: None)
        for block in (*visual.blocks, visual.merger, visual.patch_embed, visual.merger.mlp):
            block.register_forward_pre_hook(functools.partial(print))
        with pytest.warns(UserWarning, match=r"visual, patch_embed, blocks.0, blocks.1 and 2 others"):
            generated(model, inputs)


def counting(function, calls):
    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return wrapped


def test_what_was_put_on_top_stays_without_the_pruning(model):
    inputs, calls = processed(model, ONE), []
    expected, whole = generated(model, inputs), model(**inputs).logits
    for _ in range(2):
        handle = evoprune.apply(model, budget=0.2)
        model.forward, model.generate = counting(model.forward, calls), counting(model.generate, calls)
        assert model(**inputs).logits.shape[1] < whole.shape[1] and not torch.equal(generated(model, inputs), expected)
        handle.remove()
        before = len(calls)
        assert torch.equal(model(**inputs).logits, whole) and torch.equal(generated(model, inputs), expected)
        assert len(calls) > before
        with handle:  # the same handle again
            assert model(**inputs).logits.shape[1] < whole.shape[1]
        assert torch.equal(model(**inputs).logits, whole)


def test_what_was_put_on_top_can_be_taken_away_afterwards(model):
    inputs = processed(model, ONE)
    whole = model(**inputs).logits
    handle = evoprune.apply(model, budget=0.2)
    pruned, model.forward = model.forward, counting(model.forward, [])
    handle.remove()
    model.forward = pruned  # like accelerate, which restores the forward that it found
    assert torch.equal(model(**inputs).logits, whole)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    assert not other(**inputs).logits.any() and torch.equal(model(**inputs).logits, whole)
    torch.save(model, io.BytesIO())
    with evoprune.EvoPrune(budget=0.2)(model):
        assert model(**inputs).logits.shape[1] < whole.shape[1]
    assert torch.equal(model(**inputs).logits, whole)


ADAPTERS = {
    "LoRA on linear layers": ("LoraConfig", r".*visual.*(qkv|attn\.proj|gate_proj|down_proj|mlp\.0)", None),
    "IA3": ("IA3Config", r".*visual.*qkv", None),
    "weights of their own": ("LoraConfig", r".*q_proj", None),
    "LoRA on the convolution": ("LoraConfig", r".*patch_embed\.proj", "patch_embed.proj"),
    "tuned norms": ("LNTuningConfig", r".*visual.*norm2", "blocks.0.norm2"),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_on_the_tower_run_or_are_refused(model, name):
    peft = pytest.importorskip("peft")
    kind, modules, refused = ADAPTERS[name]
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    if name == "weights of their own":
        more["modules_to_save"] = ["norm1", "patch_embed", "merger"]
    inputs, plain = processed(model, ONE), model(**processed(model, ONE)).logits
    around = peft.get_peft_model(model, getattr(peft, kind)(target_modules=modules, **more))
    with torch.no_grad():
        for weight in around.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        expected = model(**inputs).logits
        assert not torch.allclose(expected, plain, atol=1e-2)
        if refused is None:
            with evoprune.EvoPrune(budget=1.0)(model):
                torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(evoprune.ModelError, match=f"adapter on {refused}"):
                evoprune.apply(model)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["compiled, then pruned", "pruned, then compiled"])
def test_a_compiled_forward(model, order):
    torch._dynamo.reset()
    inputs = processed(model, ONE)
    with torch.no_grad(), evoprune.EvoPrune(budget=0.2)(model):
        logits, answer = model(**inputs).logits, generated(model, inputs)
    whole = model(**inputs).logits
    if order == "compiled, then pruned":
        model.forward = torch.compile(model.forward, backend="eager")
    with torch.no_grad(), evoprune.EvoPrune(budget=0.2)(model):
        if order == "pruned, then compiled":
            model.forward = torch.compile(model.forward, backend="eager")
        torch.testing.assert_close(model(**inputs).logits, logits)
        assert torch.equal(generated(model, inputs), answer)
    torch.testing.assert_close(model(**inputs).logits, whole)


@pytest.mark.slow
def test_the_compiled_steps_of_generate_are_one_graph(model, monkeypatch):
    """As on a GPU, where a static cache compiles the steps. `fullgraph` raises an error if evoprune breaks the graph."""
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "0")  # transformers sets it before compiling
    torch._dynamo.reset()
    compiled = CompileConfig(backend="eager", mode=None, fullgraph=True)
    compiled._compile_all_devices = True
    torch._dynamo.utils.counters.clear()
    with evoprune.EvoPrune(budget=0.2)(model):
        for words in (7, 9):
            inputs = processed(model, (*ONE[:2], words))
            out = generated(model, inputs, cache_implementation="static", compile_config=compiled)
            assert torch.equal(out, generated(model, inputs))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.skipif(not TAKES_ENCODED, reason="Qwen3-VL needs a later transformers")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_forward_of_other_code_may_pass_encoded_videos_on_without_naming_them(family, monkeypatch):
    """Liger and subclasses of a model do this."""
    model = tiny_model(family=family)
    inputs, kind = processed(model, ONE), type(model)
    results = []
    for _ in range(2):
        whole = generated(model, inputs)
        with evoprune.EvoPrune(budget=1.0)(model):
            assert torch.equal(generated(model, inputs), whole)
        with evoprune.EvoPrune(budget=0.2)(model):
            results.append(generated(model, inputs, num_beams=2))
        stock, features = kind.forward, type(model.model).get_video_features
        names = [x for x in inspect.signature(stock).parameters.values() if x.name != "mm_encoder_outputs"]

        def forward(self, *args, stock=stock, **kwargs):
            return stock(self, *args, **kwargs)

        forward.__signature__ = inspect.Signature(names)
        monkeypatch.setattr(kind, "forward", forward)
    assert torch.equal(*results) and type(model.model).get_video_features is features
