import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune.bench.hugging_face import hugging_face_model
from evoprune.bundled import DEMOS
from evoprune.cpu import linear
from evoprune.cpu.integers import Int8Linear
from evoprune.cpu.linear import PackedLinear
from evoprune.errors import EvopruneWarning, ModelError, OutOfMemory, UsageError
from evoprune.language.generate import GenerationOptions, TokenStream, Visual, embed_prompt, prefill, stream_text
from evoprune.language.prompt import VIDEO, VisualSpan, build_prompt, prompt_positions
from evoprune.session.loading import found, model, weights
from evoprune.session.loading.folder import BUNDLED_CONFIGS
from evoprune.session.loading.found import DTYPES, look_up
from evoprune.session.loading.model import InputLimits
from evoprune.session.options import ModelOptions
from evoprune.video_qa import VideoQA
from tests.loading import edit, error_of, load_model, no_network
from tests.quantized import parameters
from tests.tiny import CHAT_TEMPLATE, tiny_model

# --- what loads ---


def test_a_saved_folder_loads_as_it_was(saved, capfd):
    loaded = load_model(str(saved), dtype="fp32", device="cpu")
    expected = tiny_model().state_dict()
    assert expected.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert (loaded.id, loaded.revision, loaded.dtype, loaded.device) == (str(saved), None, "fp32", "cpu")
    assert (loaded.is_demo, loaded.load_format) == (False, "auto")
    assert loaded.weights_bytes == sum(weight.nbytes for weight in expected.values())
    assert len(loaded.eos_ids) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_weights_come_in_the_dtype_asked_for(saved, dtype):
    loaded = load_model(str(saved), dtype=dtype)
    assert {weight.dtype for weight in loaded.model.parameters()} == {DTYPES[dtype]}


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize(("has_bf16", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_dtype_follows_the_hardware_and_the_demos_are_exact(saved, monkeypatch, has_bf16, expected, name):
    monkeypatch.setattr(found, "has_bf16", lambda device: has_bf16)
    assert load_model(str(saved), device="cpu").dtype == expected
    monkeypatch.setitem(DEMOS, name, replace(DEMOS[name], folder=saved))
    demo = load_model(name, device="cpu")
    assert (demo.dtype, demo.is_demo, demo.demo.world, demo.id) == ("fp32", True, DEMOS[name].world, name)
    assert load_model(name, device="cpu", dtype="bf16").dtype == "bf16"
    known = look_up(ModelOptions(name, device="cpu"))
    assert (known.dtype, known.demo.world) == ("fp32", DEMOS[name].world)


def test_a_loaded_model_answers(saved):
    loaded = load_model(str(saved), dtype="fp32")
    prompt = build_prompt(loaded.tokenizer, "What happens?", [(VIDEO, 12)])
    pixels = torch.randn(48, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = hugging_face_model(loaded.model).model.visual(pixels, torch.tensor([[2, 4, 6]])).pooler_output
    kept = torch.tensor([0, 5, 7])
    span = VisualSpan(prompt.places[0].runs[0].start, (2, 2, 3), 1.0)
    positions = prompt_positions(len(prompt.input_ids), [span], loaded.model.config.vision_config.tokens_per_second)
    embeds, columns = embed_prompt(loaded.model, prompt.input_ids, [Visual(prompt.places[0], features[kept], kept)])
    state = prefill(loaded.model, embeds, positions[:, columns], int(positions.max()) + 1)
    answer = TokenStream(loaded.model, state, GenerationOptions(max_new_tokens=8), loaded.eos_ids)
    assert "".join(stream_text(loaded.tokenizer, answer))
    assert answer.finish_reason in ("stop", "length")


def test_shards_load_as_one(folder):
    tiny_model().save_pretrained(folder / "shards", max_shard_size="300KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "shards").glob("*.safetensors*"):
        file.rename(folder / file.name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_model(str(folder), dtype="fp32")
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.full
def test_loading_leaves_transformers_alone(saved):
    code = f"""import sys; from evoprune.session.loading.model import load_model
load_model({str(saved)!r}); sys.exit('transformers' in sys.modules)"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_in_their_own_dtype_stay_in_the_file(folder):
    half = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc here")
    loaded = load_model(str(folder), dtype="bf16")
    mapped = [
        line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith("model.safetensors")
    ]
    at = loaded.model.model.language_model.layers[0].mlp.up_proj.weight.data_ptr()
    assert any(int(start, 16) <= at < int(end, 16) for start, end in mapped)


def test_large_layers_of_the_language_model_are_packed_when_few_rows_come(saved, monkeypatch):
    assert not any(
        layer.waits for layer in model.load_model(str(saved)).model.modules() if isinstance(layer, PackedLinear)
    )
    monkeypatch.setattr(linear, "SMALL_WEIGHT", 0)
    loaded = model.load_model(str(saved), dtype="fp32")
    tower, layers = (
        [layer for layer in part.modules() if isinstance(layer, PackedLinear)]
        for part in (loaded.model.model.visual, loaded.model.model.language_model)
    )
    assert tower and not any(layer.waits for layer in tower)
    assert layers and all(layer.waits for layer in layers) and loaded.packing.seconds == 0
    assert set(loaded.load_seconds) == {"tokenizer", "weights", "prepare"} and min(loaded.load_seconds.values()) > 0
    report = VideoQA(loaded).encode("samples/square.mp4", frames=4).ask("What?", max_new_tokens=3)
    assert report.text is not None and not any(layer.waits for layer in layers)
    times, tokens = report.report.time_ms, report.report.tokens.new
    assert times.pack == pytest.approx(1000 * loaded.packing.seconds) and times.pack > 0
    assert times.load_weights == pytest.approx(1000 * loaded.load_seconds["weights"])
    rate = report.report.rate.generate_tok_s
    assert rate is None or rate >= (tokens - 1) / times.generate * 999  # without packing; to a thousandth


@pytest.mark.parametrize("quantize", parameters("none", "int8", "int4"))
def test_forms_of_the_weights(saved, quantize, monkeypatch):
    sizes = {}
    for available in (None, 0):
        monkeypatch.setattr(weights, "available_memory", lambda _, available=available: available)
        loaded = model.load_model(str(saved), dtype="fp32", quantize=quantize)
        layer = loaded.model.model.language_model.layers[0].mlp.up_proj
        assert loaded.quantize == quantize
        qkv = loaded.model.model.visual.blocks[0].attn.qkv
        if quantize == "none":
            assert isinstance(layer, PackedLinear) == isinstance(qkv, PackedLinear) == (available is None)
        else:
            assert isinstance(layer.full if quantize == "int4" else layer, Int8Linear) and isinstance(qkv, Int8Linear)
        sizes[available] = loaded.weights_bytes
    plain = sum(weight.nbytes for weight in tiny_model().parameters())
    assert sizes[None] == sizes[0] and (sizes[0] == plain if quantize == "none" else sizes[0] < plain)


@pytest.mark.parametrize("quantize", parameters("int8", "int4"))
def test_a_model_may_compute_in_a_wider_dtype_than_its_file_has(quantize):
    """The bundled weights are stored in 16 bits."""
    qa = VideoQA.load("demo", dtype="fp32", quantize=quantize)
    assert qa.ask("samples/square.mp4", "What colour is the square?").text == "green"


def test_quantising_needs_a_cpu(saved):
    with pytest.raises(UsageError, match="unknown quantisation"):
        load_model(str(saved), quantize="int3")
    with pytest.raises(UsageError, match="CPU"):
        load_model(str(saved), quantize="int8", device="meta")


def test_names_of_older_and_newer_checkpoints(folder):
    mapped = load_model(str(folder), dtype="fp32").model.state_dict()
    expected = {name: weight.clone() for name, weight in mapped.items()}  # the file is written anew below
    for name_of in (
        lambda k: k,
        lambda k: k.replace("model.visual.", "visual.").replace("model.language_model.", "model."),
    ):
        save_file({name_of(k): v.clone() for k, v in expected.items()}, folder / "model.safetensors", {"format": "pt"})
        found = load_model(str(folder), dtype="fp32").model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


# --- processor and generation settings ---


def test_video_limits_are_the_folders_own(saved):
    limits = load_model(str(saved)).video
    assert (limits.min_pixels, limits.max_pixels) == (12544, 50176)
    assert (limits.fps, limits.min_frames, limits.max_frames) == (2.0, 2, 32)


def test_image_limits_are_not_used_for_video(folder):
    (folder / "video_preprocessor_config.json").unlink()
    edit(folder / "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    limits = load_model(str(folder)).video
    assert (limits.min_pixels, limits.max_pixels) == (128 * 28 * 28, 768 * 28 * 28)
    assert limits.image_mean == (0.5, 0.5, 0.5)


def test_without_any_processor_settings_the_limits_are_qwens(folder):
    for name in ("video_preprocessor_config.json", "preprocessor_config.json"):
        (folder / name).unlink()
    assert load_model(str(folder)).video == InputLimits()


def test_older_and_newer_ways_to_write_video_limits(folder):
    edit(folder / "video_preprocessor_config.json", min_pixels=784, max_pixels=7840, fps=None)
    limits = load_model(str(folder)).video
    assert (limits.min_pixels, limits.max_pixels, limits.fps) == (784, 7840, 2.0)
    joint = {"video_processor": {"size": {"shortest_edge": 1568, "longest_edge": 15680}, "max_frames": 8}}
    (folder / "processor_config.json").write_text(json.dumps(joint))
    limits = load_model(str(folder)).video
    assert (limits.min_pixels, limits.max_pixels, limits.max_frames) == (1568, 15680, 8)


def test_settings_of_the_processor_that_are_not_used_are_named_once(folder):
    name = "video_preprocessor_config.json"
    edit(
        folder / name,
        do_resize=True,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        num_frames=None,
        resample=3,
    )
    # What transformers writes of itself for these models; frames are chosen by the options.
    edit(folder / name, do_sample_frames=False, video_processor_type="Qwen2VLVideoProcessor", do_center_crop=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(folder))
    edit(folder / name, num_frames=8, do_normalize=False, do_resize=False, video_processor_type="Qwen3VLVideoProcessor")
    edit(folder / "preprocessor_config.json", do_resize=False, resample=2)
    with pytest.warns(EvopruneWarning) as said:
        load_model(str(folder))
    (warning,) = said
    named = "do_sample_frames=false, num_frames=8, do_resize=false, do_normalize=false, resample=2"
    assert str(warning.message) == f"{folder}: settings of the processor that are not used: {named}"


@pytest.mark.parametrize(("setting", "expected"), [(7, (7,)), ([7, 8], (7, 8)), (None, (400,))])
def test_end_tokens(folder, setting, expected):
    edit(folder / "generation_config.json", eos_token_id=setting)
    assert load_model(str(folder)).eos_ids == expected


def test_chat_template_of_the_hubs_older_layout(folder):
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    assert load_model(str(folder)).tokenizer.chat_template == CHAT_TEMPLATE


# --- what does not load ---


def drop(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name, content):
    return lambda folder: (folder / name).write_text(content)


def config(**changes):
    return lambda folder: edit(folder / "config.json", **changes)


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def tear_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 100) + b"no json")


def lose_a_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def lose_a_tensor(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in weights.items() if k != "lm_head.weight"}, folder / "model.safetensors", {"format": "pt"}
    )


def pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def other_architecture_without_weights(folder):
    (folder / "model.safetensors").unlink()
    edit(folder / "config.json", model_type="llava")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop("config.json"), "holds no config.json"),
        (write("config.json", "{"), "cannot be read"),
        (write("config.json", "[]"), "not a JSON object"),
        (config(model_type="qwen3_5"), "of type 'qwen3_5', not qwen2_5_vl or qwen2_vl or qwen3_vl"),
        (config(model_type="qwen3_vl_moe"), "is a mixture of experts"),
        (config(model_type="qwen2_vl"), "no valid qwen2_vl config: vision_config has no embed_dim"),
        (other_architecture_without_weights, "of type 'llava'"),
        (config(text_config={"hidden_size": "many"}), "no valid qwen2_5_vl config"),
        (config(quantization_config={"quant_method": "awq"}), "quantized"),
        (drop("model.safetensors"), "no safetensors weights"),
        (pickle_only, "no safetensors weights"),
        (truncate, "damaged or incomplete"),
        (tear_header, "damaged or incomplete"),
        (lose_a_shard, "00002.safetensors is missing"),
        (lose_a_tensor, "lack 1 tensor, first lm_head.weight"),
        (drop("tokenizer.json"), "holds no tokenizer"),
        (write("tokenizer.json", "{}"), "tokenizer .* cannot be loaded"),
        (drop("chat_template.jinja"), "no chat template"),
    ],
)
def test_damaged_folders_say_what_is_wrong(folder, damage, message, capfd):
    damage(folder)
    assert re.search(message, error_of(folder))
    assert capfd.readouterr() == ("", "")


def test_weights_of_other_dimensions_are_refused(folder):
    content = json.loads((folder / "config.json").read_text())
    content["text_config"]["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(content))
    assert "cannot be loaded" in error_of(folder)


@pytest.mark.parametrize(
    "name", ["nothing", "./no/such", "/no/such", "a/b/c", "a b/c", "org/", "../x", "o--x/y", "o/..x"]
)
def test_names_that_are_neither_folder_nor_hub_id(name):
    assert "neither a folder here nor a hub id" in error_of(name)


def test_a_name_that_is_nearly_right_is_named():
    with pytest.raises(ModelError) as caught:
        load_model("Demo")
    assert caught.value.hint.startswith("did you mean demo? ")
    with pytest.raises(ModelError) as caught:
        load_model("qwen2.5-vl-3b")
    assert caught.value.hint.startswith("did you mean Qwen/Qwen2.5-VL-3B-Instruct? ")
    assert "the name of the model is empty" in error_of(" ")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere paths are text")
def test_a_folder_whose_name_is_no_text_is_not_called_damaged(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / os.fsdecode(b"mod\xe8le"))
    assert "is not valid text" in error_of(folder)


def test_a_file_is_not_a_model(saved):
    assert "is a file" in error_of(saved / "model.safetensors")


@pytest.mark.parametrize("name", DEMOS)
def test_a_missing_demo_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setitem(DEMOS, name, replace(DEMOS[name], folder=tmp_path / "gone"))
    assert f"the bundled {name} model is missing" in error_of(name)


@pytest.mark.parametrize(
    "options",
    [
        {"device": "toaster"},
        {"device": "cuda:99"},
        {"dtype": "int3"},
        {"load_format": "gguf"},
        {"revision": "main"},
    ],
)
def test_options_that_make_no_sense_are_usage_errors(saved, options):
    with pytest.raises(UsageError) as caught:
        load_model(str(saved), **options)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_running_out_of_memory_has_its_own_error(saved, monkeypatch):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(model, "load_weights", full)
    with pytest.raises(OutOfMemory, match="do not fit") as caught:
        load_model(str(saved))
    assert (caught.value.exit_code, caught.value.stage) == (5, "load")


# --- random weights ---


@pytest.fixture(scope="module")
def dimensions_only(saved, tmp_path_factory):
    """A folder with nothing but config.json, embeddings tied as in the 3B model."""
    folder = tmp_path_factory.mktemp("dimensions")
    shutil.copy(saved / "config.json", folder)
    edit(folder / "config.json", tie_word_embeddings=True)
    return str(folder)


def test_random_weights_need_dimensions_only(dimensions_only, capfd):
    loaded = load_model(dimensions_only, load_format="dummy", dtype="bf16")
    assert loaded.tokenizer is None
    assert (loaded.load_format, loaded.is_demo, loaded.dtype) == ("dummy", False, "bf16")
    assert loaded.eos_ids == (400,)
    weights = dict(loaded.model.named_parameters())
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    for name, weight in weights.items():
        if weight.ndim == 1:
            assert weight.unique().tolist() == [0.0 if name.endswith("bias") else 1.0]
        else:
            assert weight.float().std() == pytest.approx(0.02, rel=0.1)
            assert len(weight.flatten(1).unique(dim=0)) == len(weight)
    assert loaded.model.lm_head.weight is loaded.model.model.language_model.embed_tokens.weight
    assert "lm_head.weight" not in weights
    assert capfd.readouterr() == ("", "")


def test_random_weights_are_the_same_every_time(dimensions_only):
    one, two = (load_model(dimensions_only, load_format="dummy").model.state_dict() for _ in range(2))
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_random_weights_compute_finite_numbers(dimensions_only):
    model = load_model(dimensions_only, load_format="dummy", dtype="fp32").model
    state = prefill(model, model.model.language_model.embed_tokens(torch.arange(9)), torch.arange(9).expand(3, -1), 9)
    assert state.logits.isfinite().all()
    assert state.logits.std() > 0


def test_random_weights_keep_the_folders_tokenizer(saved):
    assert load_model(str(saved), load_format="dummy").tokenizer is not None


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("name", "billions"), [("Qwen/Qwen2.5-VL-3B-Instruct", 3.754622976), ("Qwen/Qwen2.5-VL-7B-Instruct", 8.292166656)]
)
def test_bundled_configs_have_the_published_size(name, billions, monkeypatch):
    assert set(BUNDLED_CONFIGS) >= {name}
    monkeypatch.setattr(socket.socket, "connect", no_network)
    # On the meta device weights have a shape and no memory.
    loaded = load_model(name, load_format="dummy", device="meta", dtype="bf16")
    assert sum(weight.numel() for weight in loaded.model.parameters()) == round(billions * 1e9)
    assert loaded.weights_bytes == round(billions * 2e9)
    assert loaded.eos_ids == (151645,)
    assert loaded.video == InputLimits()


def test_random_weights_of_unknown_hub_ids_are_refused():
    assert "no bundled config" in error_of("Qwen/Qwen2-VL-2B-Instruct", load_format="dummy")
