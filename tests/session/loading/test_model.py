"""Test how a model is loaded (weights, settings, device, dtype and threads), and the errors if it cannot be loaded."""

import json
import os
import re
import shutil
import struct
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune.backend import Device, pick_device
from evoprune.backend.cpu import linear
from evoprune.backend.cpu.linear import PackedLinear
from evoprune.backend.cpu.quantize import Int8Linear
from evoprune.backend.devices import is_host
from evoprune.bundled import DEMOS
from evoprune.errors import DeviceWarning, EvopruneWarning, ModelError, OutOfMemory, UsageError, memory_guard
from evoprune.language import LanguageModel
from evoprune.model import FAMILIES, Config, Cost
from evoprune.session.loading import hosted, model
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import InputLimits
from evoprune.session.loading.weights import DTYPES
from evoprune.session.options import ModelOptions
from evoprune.video_qa import VideoQA
from tests.loading import delete_when_mapped, edit, error_of, load_model
from tests.quantized import parameters
from tests.tiny import STAND_INS, save_tiny, tiny_config, tiny_model

# --- what loads ---


def test_a_saved_folder_loads_as_it_was(saved, capfd):
    loaded = load_model(str(saved), dtype="fp32", device="cpu")
    expected = tiny_model().state_dict()
    assert expected.keys() == loaded.model.state_dict().keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
    assert not any(weight.requires_grad for weight in loaded.model.parameters())
    assert (loaded.id, loaded.description.commit, loaded.dtype, loaded.device) == (str(saved), None, "fp32", "cpu")
    assert (loaded.demo, loaded.description.random) == (None, False)
    assert loaded.weights_bytes == sum(weight.nbytes for weight in expected.values())
    assert len(loaded.eos_ids) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", DEMOS)
@pytest.mark.parametrize("expected", ["bf16", "fp32"])
def test_auto_dtype_follows_the_hardware_and_the_demos_are_exact(saved, monkeypatch, expected, name):
    monkeypatch.setattr(Device, "default_dtype", expected)
    assert load_model(str(saved), device="cpu").dtype == expected
    monkeypatch.setitem(DEMOS, name, replace(DEMOS[name], folder=saved))
    demo = load_model(name, device="cpu")
    assert (demo.dtype, demo.demo.world, demo.id) == ("fp32", DEMOS[name].world, name)
    assert load_model(name, device="cpu", dtype="bf16").dtype == "bf16"
    known = describe(ModelOptions(name, device="cpu"))
    assert (known.dtype, known.demo.world) == ("fp32", DEMOS[name].world)


def test_shards_load_as_one(folder):
    tiny_model().save_pretrained(folder / "shards", max_shard_size="300KB")
    (folder / "model.safetensors").unlink()
    for file in (folder / "shards").glob("*.safetensors*"):
        file.rename(folder / file.name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    loaded = load_model(str(folder), dtype="fp32")
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)
    for dtype in ("bf16", "fp16"):
        assert {weight.dtype for weight in load_model(str(folder), dtype=dtype).model.parameters()} == {DTYPES[dtype]}


def test_weights_in_their_own_dtype_stay_in_the_file(folder):
    half = {name: weight.bfloat16() for name, weight in load_file(folder / "model.safetensors").items()}
    save_file(half, folder / "model.safetensors", {"format": "pt"})
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("no /proc here")
    loaded = load_model(str(folder), dtype="bf16")
    lines = [line for line in maps.read_text().splitlines() if line.endswith("model.safetensors")]
    mapped = [line.split()[0].split("-") for line in lines]
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
    video = VideoQA(loaded).encode("samples/square.mp4", frames=4)
    report = video.ask("What?", max_new_tokens=3)
    assert report.text is not None and not any(layer.waits for layer in layers)
    times, tokens = report.report.time_ms, report.report.tokens.new
    assert times.pack == pytest.approx(1000 * loaded.packing.seconds) and times.pack > 0
    assert times.load_weights == pytest.approx(1000 * loaded.load_seconds["weights"])
    again = video.ask("And?", max_new_tokens=3)
    assert again.text is not None and again.report.time_ms.pack == 0
    rate = report.report.rate.generate_tok_s
    assert rate is None or rate >= (tokens - 1) / times.generate * 999  # without packing; to a thousandth


@pytest.mark.parametrize("quantize", parameters("none", "int8", "int4"))
def test_forms_of_the_weights(saved, quantize, monkeypatch):
    sizes = {}
    for available in (None, 0):
        memory = SimpleNamespace(available_memory=lambda available=available: available)
        monkeypatch.setattr("evoprune.backend.weights.Device", lambda name, memory=memory: memory)
        loaded = model.load_model(str(saved), dtype="fp32", quantize=quantize)
        layer = loaded.model.model.language_model.layers[0].mlp.up_proj
        assert loaded.quantize == quantize
        qkv = loaded.model.model.visual.blocks[0].attn.qkv
        if quantize == "none":
            assert isinstance(layer, PackedLinear) == isinstance(qkv, PackedLinear) == (available is None)
        else:
            assert isinstance(getattr(layer, "full", layer), Int8Linear) and isinstance(qkv, Int8Linear)
        sizes[available] = loaded.weights_bytes
    plain = sum(weight.nbytes for weight in tiny_model().parameters())
    assert sizes[None] == sizes[0] and (sizes[0] == plain if quantize == "none" else sizes[0] < plain)


def test_names_of_older_and_newer_checkpoints(folder):
    mapped = load_model(str(folder), dtype="fp32").model.state_dict()
    expected = {name: weight.clone() for name, weight in mapped.items()}  # the file is rewritten below
    for name_of in (
        lambda k: k,
        lambda k: k.replace("model.visual.", "visual.").replace("model.language_model.", "model."),
    ):
        save_file({name_of(k): v.clone() for k, v in expected.items()}, folder / "model.safetensors", {"format": "pt"})
        found = load_model(str(folder), dtype="fp32").model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(weight, expected[name]) for name, weight in found.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_gpu_sets_up_beside_loading_runs_to_its_end(family):
    """The setup runs here because errors would go unnoticed on a GPU."""
    config = Config.parse(tiny_config(family).to_dict())
    model._warm_up(config, torch.float32, torch.device("cpu"), FAMILIES[family].native)


# --- processor and generation settings ---

OWN, IMAGE, JOINT = "video_preprocessor_config.json", "preprocessor_config.json", "processor_config.json"
EDGES = {"size": {"shortest_edge": 1568, "longest_edge": 15680}, "max_frames": 8}
OF_FOLDER = {"min_pixels": 12544, "max_pixels": 50176, "fps": 2.0, "min_frames": 2, "max_frames": 32}


@pytest.mark.parametrize(
    ("settings", "expected"),  # by file, None for no file; and limits of videos
    [
        ({}, OF_FOLDER),
        ({OWN: None, IMAGE: {"image_mean": [0.5] * 3}}, {"image_mean": (0.5, 0.5, 0.5), "max_pixels": 768 * 28 * 28}),
        ({OWN: None, IMAGE: None}, vars(InputLimits())),
        ({OWN: {"min_pixels": 784, "fps": None}}, {"min_pixels": 784, "fps": 2.0}),
        ({JOINT: {"video_processor": EDGES}}, {"min_pixels": 1568, "max_pixels": 15680, "max_frames": 8}),
    ],
    ids=["the folder's own", "images' mean alone", "Qwen's", "old", "joint"],
)
def test_limits_of_videos(folder, settings, expected):
    for name, content in settings.items():
        if content is None:
            (folder / name).unlink()
        elif (folder / name).exists():
            edit(folder / name, **content)
        else:
            (folder / name).write_text(json.dumps(content))
    limits = load_model(str(folder)).video
    assert {name: getattr(limits, name) for name in expected} == expected


def test_settings_of_the_processor_that_are_not_used_are_named_once(folder):
    name = "video_preprocessor_config.json"
    usual = {"do_resize": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "resample": 3}
    edit(folder / name, num_frames=None, **usual)
    # transformers writes these for its own models; frames are chosen by the options.
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
    assert str(warning.message) == f"{folder}: ignored processor settings: {named}"


# --- what does not load ---

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
SHARD = json.dumps({"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}).encode()
DAMAGE = [  # file; new content (bytes, changed entries, or None for no file); the error message
    (CONFIG, None, "contains no config.json"),
    (CONFIG, lambda old: b"{", "cannot be read"),
    (CONFIG, lambda old: b"[]", "not a JSON object"),
    (CONFIG, {"model_type": "llava"}, f"of type 'llava', not {' or '.join(FAMILIES)}$"),
    (CONFIG, {"model_type": "qwen2_vl"}, "not a valid qwen2_vl config: vision_config has no embed_dim"),
    (CONFIG, {"text_config": {"hidden_size": "many"}}, "not a valid qwen2_5_vl config"),
    (WEIGHTS, None, "no safetensors weights"),
    (WEIGHTS, lambda old: old[:-1000], "damaged or incomplete"),
    (WEIGHTS, lambda old: struct.pack("<Q", 100) + b"no json", "damaged or incomplete"),
    (INDEX, lambda old: SHARD, "00002.safetensors is missing"),
    ("tokenizer.json", None, "contains no tokenizer"),
    ("tokenizer.json", lambda old: b"{}", "tokenizer .* cannot be loaded"),
    ("chat_template.jinja", None, "no chat template"),
]


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE)
def test_damaged_folders_say_what_is_wrong(folder, name, change, message, capfd):
    file = folder / name
    if name == INDEX:
        (folder / WEIGHTS).unlink()
    if change is None:
        file.rename(folder / "pytorch_model.bin")  # nothing reads this name
    elif isinstance(change, dict):
        edit(file, **change)
    else:
        file.write_bytes(change(file.read_bytes() if file.exists() else b""))
    assert re.search(message, error_of(folder))
    assert capfd.readouterr() == ("", "")


def test_weights_that_are_deleted_while_they_are_opened(folder, monkeypatch):
    delete_when_mapped(monkeypatch)
    assert "model.safetensors is damaged or incomplete: unable to open file" in error_of(folder)


NO_NAMES = {
    **dict.fromkeys(
        ["nothing", "./no/such", "/no/such", "a/b/c", "a b/c", "org/", "../nay", "o--x/y", "o/..x", "x" * 5000, "a\0b", "\x1b[31m"],
        "neither a folder here nor a hub id",
    ),
    " ": "the model name is empty",
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_names_that_are_neither_folder_nor_hub_id(name):
    assert NO_NAMES[name] in error_of(name)


@pytest.mark.parametrize(("name", "right"), [("Demo", "demo"), ("qwen2.5-vl-3b", "Qwen/Qwen2.5-VL-3B-Instruct")])
def test_a_name_that_is_nearly_right_is_named(name, right):
    with pytest.raises(ModelError) as caught:
        load_model(name)
    assert caught.value.hint.startswith(f"did you mean {right}? ")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere paths are text")
def test_a_folder_whose_name_is_no_text_is_not_called_damaged(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / os.fsdecode(b"mod\xe8le"))
    assert "is not valid text" in error_of(folder)
    assert "is a file" in error_of(saved / "model.safetensors")


@pytest.mark.parametrize("name", DEMOS)
def test_a_missing_demo_says_so(tmp_path, monkeypatch, name):
    monkeypatch.setitem(DEMOS, name, replace(DEMOS[name], folder=tmp_path / "gone"))
    assert f"the bundled {name} model is missing" in error_of(name)


@pytest.mark.parametrize("options", [{"device": "toaster"}, {"device": "cuda:99"}, {"revision": "main"}], ids=str)
def test_options_that_make_no_sense_are_usage_errors(saved, options):
    with pytest.raises(UsageError) as caught:
        load_model(str(saved), **options)
    assert caught.value.hint and "\n" not in caught.value.message


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
    """Return a folder that contains only config.json. The embeddings are tied, as in the 3B model."""
    folder = tmp_path_factory.mktemp("dimensions")
    shutil.copy(saved / "config.json", folder)
    edit(folder / "config.json", tie_word_embeddings=True)
    return str(folder)


def test_random_weights_need_dimensions_only(dimensions_only, capfd):
    loaded = load_model(dimensions_only, load_format="dummy", dtype="bf16")
    assert loaded.tokenizer is None
    assert (loaded.description.random, loaded.demo, loaded.dtype) == (True, None, "bf16")
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


def test_random_weights_are_the_same_in_every_program_and_compute_finite_numbers(saved):
    def weights():
        loaded = load_model(str(saved), load_format="dummy", dtype="bf16")
        assert loaded.tokenizer is not None  # the folder has one
        return loaded.model.state_dict()

    expected = weights()
    torch.set_default_dtype(torch.float64)
    try:
        again = weights()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(again[name], weight) for name, weight in expected.items())
    assert {weight.dtype for weight in again.values()} == {torch.bfloat16}
    model = load_model(str(saved), load_format="dummy", dtype="fp32").model
    state = LanguageModel(model).prefill(
        model.model.language_model.embed_tokens(torch.arange(9)), torch.arange(9).expand(3, -1), 9
    )
    assert state.logits.isfinite().all() and state.logits.std() > 0


def test_random_weights_of_unknown_hub_ids_are_refused():
    assert "no bundled config" in error_of("Qwen/Qwen2-VL-2B-Instruct", load_format="dummy")


OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update"


def test_where_torch_finds_another_device_than_drivers_promise_loading_says_so(saved, monkeypatch):
    """Tests without the `cuda` mark see no GPU. The device that was chosen before loading is final, so nothing is planned again."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pick_device("cpu", auto=True).type == "cpu"

    def refuses(*_, device, **__):
        warnings.warn(OLD_DRIVER, UserWarning, stacklevel=1)
        raise RuntimeError("No CUDA GPUs are available")

    with monkeypatch.context() as patch:
        patch.setattr("evoprune.backend.limits.DeviceName.resolve", lambda _: "cuda")
        patch.setattr(torch, "zeros", refuses)
        with pytest.raises(
            UsageError, match=r"a GPU driver is installed, but .*too old \(found version 11040\)"
        ) as refused:
            load_model(str(saved))
    assert refused.value.hint.startswith("use --device cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(DeviceWarning, match="torch finds a GPU that is not used"):
        assert load_model(str(saved)).device == "cpu"


@pytest.mark.parametrize(("visible", "hint"), [("", "CUDA_VISIBLE_DEVICES is ''"), (None, "auto finds a GPU")])
def test_what_hides_a_gpu_is_in_the_hint(monkeypatch, visible, hint):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError) as refused:
        pick_device("cuda:7")
    assert refused.value.hint.endswith(hint)


DTYPES_OF = {
    ("cuda:0", False): "bf16",
    ("cuda:1", False): "fp32",
    ("cuda:0", True): "fp32",
    ("xpu", False): "bf16",
    ("mps", False): "fp32",
}


@pytest.mark.parametrize(("device", "demo"), DTYPES_OF)
def test_the_dtype_of_a_device(device, demo, monkeypatch):
    capability = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device.index])
    folder = DEMOS["demo"].folder if demo else None
    for asked, expected in (("auto", DTYPES_OF[device, demo]), ("bf16", "bf16")):
        described = describe(ModelOptions(dtype=asked, device=device))
        assert replace(described, folder=folder).dtype == expected


def test_two_models_on_one_gpu(monkeypatch):
    """Memory used by other processes is not available, but unused memory in this process's allocator is."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * gib, 16 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * gib)
    assert Device("cuda:1").available_memory() == 4 * gib and Device("cuda:1").shortage(4 * gib) is None
    assert Device("cuda:1").shortage(5 * gib) == "needs about 5.0 GiB of memory, and 4.0 GiB are available"


def test_reading_waits_everywhere_but_on_the_cpu(monkeypatch):
    names = "cpu", "cuda:1", "xpu", "mps", "meta"
    assert [name for name in names if is_host(torch.device(name))] == ["cpu"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert Device.kinds() == {"cpu", "xpu"}


FREE = "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.25 GiB is free."
NO_ROOM = {
    FREE: ": 2.00 GiB requested, 1.25 GiB free",
    "Tried to allocate 512.00 MiB.\nGPU 0 has a total capacity of ...": ": 512.00 MiB requested",
    "": "",
}


@pytest.mark.parametrize("says", NO_ROOM)
def test_running_out_of_memory_on_a_gpu_has_numbers(says):
    with pytest.raises(OutOfMemory) as raised, memory_guard("encode"):
        raise torch.OutOfMemoryError(f"CUDA out of memory. {says}")
    assert raised.value.message == f"out of memory in encode{NO_ROOM[says]}" and raised.value.exit_code == 5


@pytest.fixture
def three_threads(monkeypatch):
    """Imitate a host program that uses three threads on a machine with eight cores."""
    monkeypatch.setattr("evoprune.backend.limits.Host.available_cores", lambda _: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weights", "cores", "count"),
    [(4_000_000, 64, 1), (72_000_000, 8, 2), (3_754_622_976, 4, 4), (3_754_622_976, 1, 1), (0, 4, 1)],
)
def test_small_models_get_one_thread_and_large_ones_all_cores(weights, cores, count, monkeypatch, three_threads):
    monkeypatch.setattr("evoprune.backend.limits.Host.available_cores", lambda _: cores)
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.setattr(Cost, "parameters", weights)
    describe(ModelOptions(threads="auto")).use_threads()
    assert torch.get_num_threads() == count


@pytest.mark.parametrize(
    ("wanted", "environment", "count"), [(None, "", 3), ("auto", "", 1), ("auto", "5", 3), (2, "", 2), ("2", "5", 2)]
)
def test_threads_of_a_model(saved, monkeypatch, wanted, environment, count, three_threads):
    """If there is no option, torch keeps the number of threads that the host program has set."""
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    load_model(str(saved), dtype="fp32", threads=wanted)
    assert torch.get_num_threads() == count


def test_more_threads_than_cores_are_a_warning(saved, three_threads, recwarn):
    load_model(str(saved), dtype="fp32", threads=8)
    assert not recwarn.list
    load_model(str(saved), dtype="fp32", threads=9)
    (warning,) = recwarn.list
    assert str(warning.message) == "9 threads on 8 cores are usually slower than 8 threads"
    assert issubclass(warning.category, EvopruneWarning) and torch.get_num_threads() == 9


# For some families: values of another family that differs only in these values.
OTHER_VALUES = {
    "qwen2_5_vl": {"unstated": {"min_pixels": 28 * 28, "max_pixels": 56 * 56}},
    "qwen3_vl": {
        "text": {"rope_theta": 1e4, "mrope_section": [24, 20, 20], "head_dim": 128},
        "vision": {"num_position_embeddings": 2304, "deepstack_visual_indexes": (1, 2, 3), "patch_size": 14},
        "video": {"image_mean": (0.4, 0.5, 0.6), "max_pixels": 10**6, "of_all_frames": True},
    },
    "qwen3_5": {"series": ("Qwen9",), "video": {}},
    "qwen3_vl_moe": {"series": ("Qwen9-VL",)},
}


@pytest.mark.parametrize(
    "known",
    [
        "qwen3_vl",
        *(pytest.param(name, marks=pytest.mark.full) for name in OTHER_VALUES if name != "qwen3_vl"),
    ],
)
def test_a_family_that_differs_in_values_is_one_entry(known, tmp_path, monkeypatch):
    """Another entry, in `STAND_INS`, is enough for tests with a tiny model, even if transformers has no classes of the family."""
    family = known.replace("qwen", "qwen9_")
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[known], **OTHER_VALUES[known]))
    monkeypatch.setitem(STAND_INS, family, known)
    folder = save_tiny(tmp_path / "model", family=family)
    (folder / "preprocessor_config.json").unlink()
    (folder / "video_preprocessor_config.json").unlink()
    qa = VideoQA(load_model(str(folder), dtype="fp32"))
    traits = qa.loaded.model.config.vision_config.traits
    assert traits is FAMILIES[family] and traits.native == FAMILIES[known].native
    limits = qa.loaded.limits
    assert limits["picture"].max_pixels == traits.unstated["max_pixels"]
    assert limits["video"].image_mean == traits.video.get("image_mean", limits["video"].image_mean)
    assert limits["video"].patch_size == traits.vision.get("patch_size", 14)
    text = qa.encode("samples/square.mp4", frames=4).ask("What?", max_new_tokens=6).text
    assert text
    if traits.native:  # the language model of the transformers classes gives the same answer
        monkeypatch.setitem(FAMILIES, family, replace(traits, native=False))
        hosted = VideoQA(load_model(str(folder), dtype="fp32"))
        assert type(hosted.loaded.model).__name__ != type(qa.loaded.model).__name__
        assert hosted.encode("samples/square.mp4", frames=4).ask("What?", max_new_tokens=6).text == text


def test_models_that_load_at_the_same_time_restore_the_state_of_the_process():
    """The blocks end in the order in which they began, as in two threads."""
    from transformers.utils import logging as log

    def state():
        return log.get_verbosity(), log.is_progress_bar_enabled(), dict(os.environ), [*sys.path]

    before = state()
    blocks = []
    for _ in range(2):
        blocks += [hosted.quiet_transformers(), hosted._environment_kept()]
        for block in blocks[-2:]:
            block.__enter__()
        os.environ["EVOPRUNE_SET_BY_A_PACKAGE"] = "a"
        sys.path.append("added by a package")
    for block in blocks:
        block.__exit__(None, None, None)
    assert state() == before
