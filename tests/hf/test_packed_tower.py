import weakref

import pytest
import torch

import evoprune
from evoprune.backend import Packing
from evoprune.backend.cpu.linear import PackedLinear
from evoprune.backend.cpu.quantize import Int8Linear
from evoprune.hf.encoding import PackedTower
from evoprune.model import FAMILIES
from tests.hf.reference import skip_where_not_taken
from tests.prompts import processed
from tests.quantized import parameters
from tests.tiny import NATIVE, tiny_model

pytestmark = pytest.mark.skipif(not Packing.supports(torch.empty(1)), reason="this torch has no packed products")
INT8 = parameters("int8")
PROMPT = (5, ("image", 4, 4), 2, ("video", 4, 8, 12), 7)


@pytest.mark.few(2)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_the_models_own_and_the_model_does_not_change(family):
    skip_where_not_taken(model := tiny_model(family=family))
    inputs, wish = processed(model, PROMPT), {"max_new_tokens": 8, "do_sample": False}
    before, modules, expected = model.state_dict(), dict(model.named_modules()), model.generate(**inputs, **wish)
    with evoprune.EvoPrune(budget=0.3)(model):
        pruned = model.generate(**inputs, **wish)
    with evoprune.EvoPrune(budget=0.3, pack=True)(model):
        assert torch.equal(model.generate(**inputs, **wish), pruned)
    with evoprune.EvoPrune(budget=1.0, pack=True)(model) as run:
        assert torch.equal(model.generate(**inputs, **wish), expected)
        during, copies = model.state_dict(), weakref.ref(run._packed.current())
        assert dict(model.named_modules()) == modules
    assert copies() is None
    assert before.keys() == during.keys() == model.state_dict().keys()
    assert all(one.data_ptr() == during[name].data_ptr() for name, one in before.items())
    linear = [layer for layer in model.model.visual.modules() if type(layer) is torch.nn.Linear]
    held = sum(weight.nbytes for weight in model.parameters()) + sum(layer.weight.nbytes for layer in linear)
    assert run.report.memory.weights_bytes >= held  # packing may pad


CHANGES = ["load_state_dict", "data", "in place", "another tensor", "another layer", "bias in place", "another bias"]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_packed_again(change):
    visual = tiny_model().model.visual
    tower, layer = PackedTower(visual), visual.blocks[0].attn.qkv
    first = tower.current()
    assert tower.current() is first
    with torch.no_grad():
        match change:
            case "load_state_dict":
                visual.load_state_dict(tiny_model(1).model.visual.state_dict())
            case "data":
                layer.weight.data += 0.1
            case "in place":
                layer.weight[3, 5] += 1  # one number outside the sample
            case "another tensor":
                layer.weight.data = layer.weight * 2
            case "another layer":
                visual.blocks[0].attn.qkv = torch.nn.Linear(layer.in_features, layer.out_features)
            case "bias in place":
                layer.bias[3] += 1
            case "another bias":
                layer.bias = torch.nn.Parameter(layer.bias + 1)
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(tower.current().blocks[0].attn.qkv(x), visual.blocks[0].attn.qkv(x))


def test_packed_layers_refuse_an_autocast_to_another_dtype():
    tower = PackedTower(tiny_model().model.visual)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(evoprune.UsageError, match="does not work with torch"),
    ):
        tower.current()


# Random recurrent states, as in qwen3_5, magnify any error.
@pytest.mark.parametrize("family", [*(family for family in NATIVE if family != "qwen3_5"), "qwen3_vl_moe"])
@pytest.mark.parametrize("pack", INT8)
@torch.no_grad()
def test_a_tower_in_8_bits_is_near_the_models_own(pack, family):
    skip_where_not_taken(model := tiny_model(family=family))
    inputs, before = processed(model, PROMPT), model.state_dict()
    logits = [model(**inputs).logits]
    with evoprune.EvoPrune(budget=1.0, pack=pack)(model) as run:
        logits.append(model(**inputs).logits)
        assert run.report.memory.weights_bytes > sum(weight.nbytes for weight in model.parameters())
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.05
    assert all(one.data_ptr() == before[name].data_ptr() for name, one in model.state_dict().items())
    assert type(model.model.visual.blocks[0].attn.qkv) is torch.nn.Linear


@pytest.mark.parametrize("pack", [True, *INT8])
def test_a_layer_with_hooks_stays_as_it_is(pack):
    visual, seen = tiny_model().model.visual, []
    visual.blocks[0].attn.qkv.register_forward_hook(lambda *call: seen.append(call))
    made = PackedTower(visual, pack).current()
    first, second = (block.attn.qkv for block in made.blocks)
    first(torch.randn(2, 64))
    assert type(first) is torch.nn.Linear and type(second) is (PackedLinear if pack is True else Int8Linear) and seen


def test_where_packing_saves_nothing_it_is_refused_and_nothing_is_pruned():
    model = tiny_model().half()
    with pytest.raises(evoprune.UsageError, match="float16 on cpu"):
        evoprune.apply(model, pack=True)
    assert "forward" not in vars(model)
    with pytest.raises(evoprune.UsageError, match="works on the CPU"):
        PackedTower(model.model.visual.to("meta"), "int8")
    with pytest.raises(evoprune.UsageError, match="pack"):
        evoprune.EvoPrune(pack="int3")
