"""Models whose language model is a module of transformers: Qwen3.5 with its recurrent states, mixtures of experts, quantised ones.

tests/session/test_qwen3.py compares their answers with `generate` at full budget, and below it with prompts written by hand.
"""

import json
import logging
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from evoprune.bench.profile_results import TimeLimit
from evoprune.bench.verify.run import CHECKS, subject_of, verify
from evoprune.errors import QUANTIZERS, ModelError, ModelWarning, PluginError, UsageError
from evoprune.language import hosted
from evoprune.session.loading.find import PACKAGES, check_packages, find_model
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions
from evoprune.video_qa import VideoQA
from tests.tiny import save_tiny

CLIP = "samples/square.mp4"
FAMILIES = ["qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp(request.param), family=request.param)


def loaded(tmp_path_factory, family: str):
    return load_model(str(save_tiny(tmp_path_factory.mktemp(family), family=family)), dtype="fp32", pack=False)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    return loaded(tmp_path_factory, "qwen3_5")


@pytest.fixture(scope="module", params=["recurrent", "croppable"])
def either(request, tmp_path_factory):
    """A model whose cache cannot be cropped, and one with DeepStack whose cache can."""
    if request.param == "recurrent":
        return request.getfixturevalue("hybrid")
    return loaded(tmp_path_factory, "qwen3_vl_moe")


def said(inputs, question: str, **options) -> list[int]:
    answer = inputs.ask(question, max_new_tokens=6, **options)
    return answer.ids if answer.text is not None else []


@pytest.mark.parametrize("budget", [1.0, 0.25])
def test_the_engines_give_the_same_answer(budget):
    def answer(engine: str) -> list[int]:
        qa = VideoQA.load("demo", engine=engine, budget=budget)
        assert qa.loaded.facts().engine == engine
        return said(qa.encode(CLIP), "What happens?")

    assert answer("transformers") == answer("native")


def test_several_questions_are_answered_as_fresh_ones(either):
    qa = VideoQA(either, budget=0.3)
    inputs = qa.encode(CLIP)
    for number in range(5):
        how = {"system": "Be brief."} if number % 4 == 3 else {}
        if number % 3 == 2:
            how |= {"temperature": 1.0, "seed": number}
        question = "What?" + " And then?" * number
        assert said(inputs, question, **how) == said(qa.encode(CLIP), question, **how), number


def test_an_answer_that_breaks_off_leaves_the_state_before_it(hybrid):
    inputs = VideoQA(hybrid, budget=0.3).encode(CLIP)
    whole = said(inputs, "What happens?")
    answer = inputs.ask("Something else?", max_new_tokens=6)
    next(answer)
    answer.close()
    assert said(inputs, "What happens?") == whole


def a_prompt(columns: int):
    """Embeddings, positions, cluster sizes, and what DeepStack adds."""
    random = torch.Generator().manual_seed(0)
    embeds, deepstack = (torch.randn(*shape, generator=random) for shape in ((columns, 64), (3, columns, 64)))
    return embeds, torch.arange(columns).expand(3, -1), 1 + 9 * torch.rand(columns, generator=random), deepstack


def test_a_long_prompt_is_read_in_strips_of_masks(either, monkeypatch):
    embeds, positions, sizes, deepstack = a_prompt(20)
    added = deepstack if hosted.can_crop(either.model) else None
    read, strips = hosted._read, []

    def logits():
        given = either.model, embeds, positions, hosted.HostedCache(either.model), sizes
        return hosted.logits(*given, last=20, deepstack=added)

    whole = logits()
    monkeypatch.setattr(hosted, "STRIP", 8)
    monkeypatch.setattr(
        hosted, "_read", lambda model, embeds, *rest: strips.append(len(embeds)) or read(model, embeds, *rest)
    )
    torch.testing.assert_close(logits(), whole, rtol=1e-4, atol=1e-4)
    assert strips == [8, 8, 4]


def test_a_pass_that_fails_spoils_a_recurrent_state_alone(either):
    embeds, positions, sizes, _ = a_prompt(3)
    cache, same = (hosted.HostedCache(either.model) for _ in range(2))
    for each in (cache, same):
        hosted.forward(either.model, embeds, positions, each, sizes)
    given = either.model, embeds, positions + 3
    hook = either.model.model.language_model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hosted.forward(*given, cache)
    hook.remove()
    if cache.can_crop:
        torch.testing.assert_close(hosted.forward(*given, cache), hosted.forward(*given, same), rtol=0, atol=0)
        cache.crop(2)
        assert cache.length == len(cache.sizes) == 2
        return
    with pytest.raises(ValueError, match="a pass failed"):
        hosted.forward(*given, cache)
    with pytest.raises(ValueError, match="cannot be cut"):
        cache.crop(0)


def test_what_needs_our_own_layers_is_refused(folder):
    options = {"dtype": "fp32", "model": str(folder)}
    with pytest.raises(ModelError, match="does not run itself") as caught:
        find_model(ModelOptions(engine="native", **options))
    assert "leave the engine out" in caught.value.hint
    with pytest.raises(UsageError, match="quantize int8 is for models that evoprune runs itself"):
        find_model(ModelOptions(quantize="int8", **options))
    with pytest.raises(UsageError, match="acts inside the language model"):
        VideoQA.load(method="pyramiddrop", **options)
    with pytest.raises(UsageError, match="cannot forget the oldest tokens"):
        VideoQA.load(**options).stream()


def damaged(folder: Path, tmp_path: Path, **entries) -> str:
    """A copy of a model's folder whose config.json says something else."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((folder / "config.json").read_text()) | entries
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize("method", [method for method, (module, _) in PACKAGES.items() if find_spec(module) is None])
def test_a_package_that_is_missing_is_named(saved, tmp_path, method):
    name = damaged(saved, tmp_path, quantization_config={"quant_method": method})
    with pytest.raises(ModelError, match=f"quantised by {method}") as caught:
        load_model(name)
    assert caught.value.hint == f"pip install {PACKAGES[method][1]}"


def test_an_unknown_quantisation_is_an_error_of_the_model(saved, tmp_path):
    name = damaged(saved, tmp_path, quantization_config={"quant_method": "fictitious"})
    with pytest.raises(ModelError, match="transformers cannot load"):
        load_model(name)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (None, r"lack 1 tensor, first .*layers\.0\.linear_attn\.A_log"),
        (7, r"layers\.0\.linear_attn\.A_log is \[7\] where config\.json wants \[4\]"),
    ],
)
def test_a_tensor_that_is_missing_or_of_another_shape(hybrid, tmp_path, shape, says):
    from safetensors.torch import load_file, save_file

    folder = Path(hybrid.found.folder)
    name = damaged(folder, tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.language_model.layers.0.linear_attn.A_log"]
    if shape:
        weights["model.language_model.layers.0.linear_attn.A_log"] = torch.zeros(shape)
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=says):
        load_model(name)


def test_a_package_that_fails_to_compute_is_named(hybrid, monkeypatch):
    monkeypatch.setattr("evoprune.session.loading.find.find_spec", lambda module: True)
    monkeypatch.setitem(QUANTIZERS, "torchao", "a package that another test loaded")
    check_packages("torchao", "a model")
    layers = {"__name__": "torchao.layers"}
    exec("def fails(*given): assert False, 'no kernel'", layers)
    monkeypatch.setattr(hybrid.model.model.language_model.layers[2].mlp, "forward", layers["fails"])
    with pytest.raises(PluginError, match="the package torchao failed: AssertionError: no kernel"):
        said(VideoQA(hybrid).encode(CLIP), "What?")


def test_what_loggers_say_of_every_product_is_left_out(hybrid, caplog):
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    logger.warning("MatMul8bitLt: inputs will be cast from %s to float16 during quantization", torch.bfloat16)
    logger.warning("another")
    assert [record.getMessage() for record in caplog.records] == ["another"]


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_quantised_weights_of_which_the_config_says_nothing(saved, tmp_path, engine, dtype):
    from safetensors.torch import load_file, save_file

    name, weights = damaged(saved, tmp_path), load_file(saved / "model.safetensors")
    changed = next(stored for stored in weights if stored.endswith("layers.0.self_attn.q_proj.weight"))
    weights |= {changed: weights[changed].to(dtype), f"{changed}_scale": torch.ones(1)}
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"cannot be loaded: .*layers\.0\.self_attn\.q_proj\.weight is"):
        load_model(name, engine=engine)


def test_an_adapter_beside_the_weights_is_not_applied(hybrid, tmp_path, monkeypatch):
    import transformers.integrations.peft
    import transformers.models.auto.auto_factory

    for module in (transformers.integrations.peft, transformers.models.auto.auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
    name = damaged(Path(hybrid.found.folder), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "another/model"}))
    with pytest.warns(ModelWarning, match="holds an adapter"):
        loaded = load_model(name, dtype="fp32", pack=False)
    weights = zip(loaded.model.parameters(), hybrid.model.parameters(), strict=True)
    assert all(map(torch.equal, *zip(*weights, strict=True)))


def outcomes(loaded, *names: str) -> dict[str, str]:
    checks = [check for check in CHECKS if check.name in names]
    with subject_of(loaded, None) as subject:
        *_, results = verify(subject, TimeLimit(600), checks=checks)
    return {found.check.name: found.outcome.state for found in results.findings}


@pytest.mark.full
def test_verify_holds(folder):
    states = outcomes(load_model(str(folder), dtype="fp32", pack=False), *(check.name for check in CHECKS))
    assert "differs" not in states.values(), states
    assert {"answer", "inputs", "again", "model", "batch"} <= {
        name for name, state in states.items() if state == "held"
    }


def _other_places(text, **how):
    how["position_ids"] = how["position_ids"].clone()
    how["position_ids"][1:, :, -5:] += 1
    return text(**how)


def _bias_everywhere(text, **how):
    if "attention_mask" in how:
        sizes = how["attention_mask"][0, 0, -1].exp()
        how["inputs_embeds"] = how["inputs_embeds"] * sizes[-how["inputs_embeds"].shape[1] :, None]
    return text(**how)


@pytest.mark.parametrize(
    ("fault", "check"),
    [("state", "again"), (_other_places, "model"), (_bias_everywhere, "model")],
    ids=["a state that is not copied", "positions behind the video", "sizes in linear layers"],
)
def test_verify_finds_planted_faults(hybrid, monkeypatch, fault, check):
    assert outcomes(hybrid, check) == {check: "held"}
    if fault == "state":
        monkeypatch.setattr(hosted.HostedCache, "copy", lambda cache: cache)
    else:
        text = hybrid.model.model.language_model
        stock = text.forward

        def forward(**how):
            ours = how.get("use_cache") is True and how.get("past_key_values") is not None
            return fault(stock, **how) if ours else stock(**how)

        monkeypatch.setattr(text, "forward", forward)
    assert outcomes(hybrid, check) == {check: "differs"}


def quantised(kind: str, base: Path, folder: Path) -> None:
    """Writes a model whose language model a library has quantised."""
    import transformers
    from transformers import AutoModelForImageTextToText

    left = ["model.visual", "lm_head"]
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        config = transformers.TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=left)
    else:
        config = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=left
        )
    how = {"dtype": torch.float32, "device_map": {"": "cpu"}, "quantization_config": config}
    AutoModelForImageTextToText.from_pretrained(base, **how).save_pretrained(folder)
    for file in base.iterdir():
        if not (folder / file.name).exists():
            (folder / file.name).symlink_to(file)


@pytest.mark.full
@pytest.mark.parametrize(("kind", "package"), [("torchao", "torchao"), ("4 bits", "bitsandbytes")])
def test_a_quantised_checkpoint_is_as_in_transformers(saved, tmp_path, kind, package):
    pytest.importorskip(package)
    pytest.importorskip("accelerate")
    quantised(kind, saved, tmp_path)
    loaded = load_model(str(tmp_path), dtype="fp32")
    assert (loaded.facts().quantize, loaded.facts().engine) == (package, "transformers")
    assert outcomes(loaded, "tower", "logits", "answer", "again", "model") == dict.fromkeys(
        ("tower", "logits", "answer", "again", "model"), "held"
    )
