"""Test the values and gradients of a Hugging Face model that prunes, in every training setup.

Without pruning, the reference is the stock model. Below budget 1.0, it is the pruned model in its simplest setup: one prompt at a
time (and thus no padding), eager attention, fp32, and no checkpointing.
"""

from functools import cache

import pytest
import torch

import evoprune
from tests.hf.reference import encoded, masked, sizes_of, skip_where_not_taken, weighed_by
from tests.prompts import processed
from tests.threads import one_thread  # noqa: F401
from tests.tiny import tiny_model

ROWS = ((5, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 9, ("video", 1, 4, 4), 2))
ATTENTION = ("eager", "sdpa")
CHECKPOINTING = {"plain": None, "checkpointing": False, "reentrant checkpointing": True}
SIDES = ("left", "right")
MODELS = ("all weights", "LoRA")
BUDGETS = (1.0, 0.25)


def trained(attention="eager", checkpointing="plain", kind="all weights", family="qwen2_5_vl"):
    """Return a model in training mode with a frozen tower, and the object to call: the model, or its PEFT wrapper."""
    model = tiny_model(family=family).train()
    model.set_attn_implementation(attention)
    model.generation_config.pad_token_id = 398
    model.model.visual.requires_grad_(False)
    called = model
    if kind == "LoRA":
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        layers = r"model\.language_model.*(q|v)_proj"
        called = peft.get_peft_model(model, peft.LoraConfig(target_modules=layers, init_lora_weights=False))
        model = called.get_base_model()
    if (reentrant := CHECKPOINTING[checkpointing]) is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
    return model, called


def labels(inputs):
    """Return labels for every text token, including the first one of a row, which only padding may precede."""
    return inputs["input_ids"].masked_fill((inputs["mm_token_type_ids"] > 0) | (inputs["attention_mask"] == 0), -100)


def alone(inputs, row):
    """Return the inputs of one row of `ROWS`, without padding."""
    used, videos = inputs["attention_mask"][row].bool(), [slice(0, 1), slice(1, 3)][row]
    patches = inputs["video_grid_thw"].prod(-1).tolist()
    start = sum(patches[: videos.start])
    one = {name: inputs[name][row, None, used] for name in ("input_ids", "attention_mask", "mm_token_type_ids")}
    one["pixel_values_videos"] = inputs["pixel_values_videos"][start : start + sum(patches[videos])]
    return one | {name: inputs[name][videos] for name in ("video_grid_thw", "second_per_grid_ts") if name in inputs}


def results(model, called, inputs, **more):
    """Return the loss, and the gradients by weight name."""
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    loss = called(**inputs, **{"labels": labels(inputs)} | more).loss
    # Reentrant checkpointing only computes gradients in `backward`.
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in weights.items() if weight.grad is not None}


@cache
def reference(budget, attention, side, kind="all weights", family="qwen2_5_vl", autocast=False):
    """Return the reference loss and gradients. `attention` and `side` only matter without pruning."""
    model, called = trained(attention if budget == 1.0 else "eager", kind=kind, family=family)
    inputs = processed(model, *ROWS, side=side)
    if budget == 1.0:
        return results(model, called, inputs)
    parts, tokens = [], []
    with evoprune.EvoPrune(budget=budget)(model), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for one in (alone(inputs, row) for row in range(len(ROWS))):
            tokens.append(int((labels(one)[:, 1:] >= 0).sum()))
            parts.append(results(model, called, one))
    share = [n / sum(tokens) for n in tokens]
    mean = {name: sum(s * part[1][name] for s, part in zip(share, parts, strict=True)) for name in parts[0][1]}
    return sum(s * part[0] for s, part in zip(share, parts, strict=True)), mean


def same(made, expected, tolerance):
    """Check that each gradient differs from the expected one by a small share of its norm."""
    assert made[0].item() == pytest.approx(expected[0].item(), rel=tolerance)
    assert made[1].keys() == expected[1].keys() and made[1]
    for name, gradient in expected[1].items():
        assert (made[1][name] - gradient).norm() <= tolerance * gradient.norm() + 1e-7, name


@pytest.mark.few(5)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("attention", ATTENTION)
def test_loss_and_gradients_are_those_of_the_reference(attention, checkpointing, kind, side, budget):
    model, called = trained(attention, checkpointing, kind)
    with evoprune.EvoPrune(budget=budget)(model) as run:
        made = results(model, called, processed(model, *ROWS, side=side))
        assert (run.report.pruning.kept_ratio == 1) == (budget == 1.0)
    same(made, reference(budget, attention, side, kind), 1e-4)


def test_the_reference_is_the_stock_model_with_dropped_columns_masked():
    """Computes the loss by hand: each remaining column predicts the next one."""
    model, called = trained()
    inputs = alone(processed(model, *ROWS), 1)
    with evoprune.EvoPrune(budget=0.25)(model) as run:
        expected = results(model, called, inputs)
    made = encoded(model, inputs, 0.25, how={})
    sizes, left = sizes_of(model, inputs, made), run.columns.index[0]
    assert sizes.max() > 1 and len(left) == 18 + 9
    call = masked(model, inputs, made)
    call["position_ids"] = call["position_ids"][1:]
    model.zero_grad()
    with weighed_by(model, sizes):
        logits = model(**call).logits[0, left[:-1]]
    loss = torch.nn.functional.cross_entropy(logits, labels(inputs)[0, left[1:]])
    loss.backward()
    same((loss.detach(), {name: w.grad for name, w in model.named_parameters() if w.requires_grad}), expected, 1e-4)


@pytest.mark.full
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("attention", ATTENTION)
def test_under_autocast_they_differ_by_its_rounding(attention, checkpointing, side, budget):
    """bf16 rounds to 8 bits, so the stock model's own gradients differ by up to 3% from fp32.

    The kept tokens may differ too, so the reference below budget 1.0 is computed under autocast.
    """
    model, called = trained(attention, checkpointing)
    with evoprune.EvoPrune(budget=budget)(model), torch.autocast("cpu", torch.bfloat16):
        made = results(model, called, processed(model, *ROWS, side=side))
    same(made, reference(budget, attention, side, autocast=budget < 1), 0.06)


@pytest.mark.few(2)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_the_other_families_have_the_same_gradients(attention, family):
    model, called = trained(attention, "reentrant checkpointing", family=family)
    skip_where_not_taken(model)
    for budget in BUDGETS:
        with evoprune.EvoPrune(budget=budget)(model):
            made = results(model, called, processed(model, *ROWS))
        same(made, reference(budget, attention, "left", family=family), 1e-4)


@pytest.mark.few(1)
@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("side", SIDES)
def test_shifted_labels_give_what_labels_give(attention, side):
    model, called = trained(attention)
    inputs = processed(model, *ROWS, side=side)
    shifted = torch.nn.functional.pad(labels(inputs), (0, 1), value=-100)[:, 1:].contiguous()
    stock = results(model, called, inputs, shift_labels=shifted)
    for budget in BUDGETS:
        with evoprune.EvoPrune(budget=budget)(model):
            expected = stock if budget == 1.0 else results(model, called, inputs)
            same(results(model, called, inputs, shift_labels=shifted), expected, 1e-4)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_without_pruning_the_tower_is_trained_as_ever(mode):
    model = getattr(tiny_model(), mode)()
    inputs = processed(model, *ROWS, side="right")
    expected = results(model, model, inputs)
    assert any(name.startswith("model.visual") for name in expected[1])
    with evoprune.EvoPrune(budget=1.0)(model) as run:
        same(results(model, model, inputs), expected, 1e-6)
        assert run.columns is None and run.report.pruning.visual_tokens_in is None
        with torch.no_grad():
            model(**inputs)
        assert run.report.pruning.kept_ratio == 1


@pytest.mark.few(2)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_gradients_of_the_tower_are_refused(checkpointing):
    """In eval mode, weights still require gradients by default, so a forward pass alone does not mean training."""
    model, _ = trained("sdpa", checkpointing)
    model.model.visual.requires_grad_(True)
    inputs = processed(model, *ROWS)
    with evoprune.EvoPrune(budget=0.25)(model):
        with pytest.raises(evoprune.UsageError, match="no gradients"):
            model(**inputs)
        model.generate(**inputs, max_new_tokens=1)
        model.model.visual.eval()
        with pytest.raises(evoprune.UsageError, match="no gradients"):
            model(**inputs | {"pixel_values_videos": inputs["pixel_values_videos"].clone().requires_grad_()})
        loss = model(**inputs, labels=labels(inputs)).loss
        with pytest.raises(evoprune.UsageError, match="no gradients") as caught:
            loss.backward()
        assert "requires_grad_(False)" in caught.value.hint
        language = [weight for name, weight in model.named_parameters() if "language_model.layers" in name]
        if checkpointing != "reentrant checkpointing":  # it needs `backward`
            loss = model(**inputs, labels=labels(inputs)).loss
            assert all(gradient.norm() > 0 for gradient in torch.autograd.grad(loss, language))
