"""Models that do not load for a common reason: the error names the case, and the hint is what fixes it."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from evoprune.batch.rows import load_rows
from evoprune.errors import LFS_HINT, ModelError, UsageError, VideoError
from evoprune.session.loading.folder import original_of
from evoprune.video.frames import probe
from evoprune.video.readers import subtitles
from tests.loading import edit, load_model
from tests.session.loading.test_hub import COMMIT, cache, dead_hub, fill_cache, hub  # noqa: F401

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4242\n"


def refused(name, **options):
    with pytest.raises(ModelError) as caught:
        load_model(str(name), **options)
    return caught.value.message, caught.value.hint


def text_config(folder, **changes):
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_of_a_model(folder, name):
    (folder / name).write_text(POINTER)
    message, hint = refused(folder)
    assert f"{folder / name} is a git-lfs pointer" in message and hint == LFS_HINT


@pytest.mark.parametrize("name", ["clip.mp4", "picture.png"])
def test_a_git_lfs_pointer_of_a_clip(tmp_path, name):
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(VideoError, match="is a git-lfs pointer") as caught:
        probe(tmp_path / name)
    assert caught.value.hint == LFS_HINT


def test_git_lfs_pointers_beside_videos(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("frames/1.jpg", "frames/2.jpg", "lines.srt", "rows.jsonl"):
        (tmp_path / name).write_text(POINTER)
    for error, read in (
        (VideoError, lambda: probe(tmp_path / "frames")),
        (VideoError, lambda: subtitles.read("clip.mp4", 0.0, str(tmp_path / "lines.srt"), 0.0, 1.0)),
        (UsageError, lambda: load_rows(str(tmp_path / "rows.jsonl"))),
    ):
        with pytest.raises(error, match="is a git-lfs pointer") as caught:
            read()
        assert caught.value.hint == LFS_HINT


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "mrope_section": [2, 3, 3]}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"rope_parameters": YARN}, "rope_type 'yarn' is not supported"),
        (
            {"rope_scaling": YARN},
            "rope_type 'yarn' is not supported",
        ),  # counts more than rope_parameters, as in transformers
        (
            {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None, "sliding_window": 64},
            "sliding window attention is not supported",
        ),
        ({"hidden_act": "gelu"}, "activation gelu is not supported"),
    ],
)
def test_what_cannot_run_is_not_called_damaged(folder, changes, reason):
    text_config(folder, **changes)
    message, hint = refused(folder)
    assert message.startswith(f"evoprune cannot run {folder}: {reason}") and "again" not in hint
    assert ("config.json without yarn" in hint) == ("yarn" in reason)


def test_yarn_is_refused_wherever_it_stands(folder):
    edit(folder / "config.json", rope_scaling=YARN | {"type": "yarn"})
    assert "rope_type 'yarn' is not supported" in refused(folder)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_window_layers": 2, "sliding_window": 64},
        {"max_window_layers": None, "sliding_window": 64},
        {"max_window_layers": 0, "sliding_window": None},
        {"max_window_layers": 0, "sliding_window": 64, "layer_types": ["full_attention"] * 2},
    ],
)
def test_a_sliding_window_that_no_layer_has_is_no_reason(folder, changes):
    text_config(folder, **{"use_sliding_window": True, "layer_types": None} | changes)
    assert load_model(str(folder)).model is not None


def test_an_adapter_is_no_model(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}))
    message, hint = refused(folder)
    assert message == f"{folder} holds an adapter of Qwen/Qwen2.5-VL-3B-Instruct, not a model"
    assert "merge_and_unload" in hint


@pytest.mark.parametrize("snapshots", [0, 1])
def test_a_folder_of_the_hubs_cache(cache, saved, snapshots):  # noqa: F811
    fill_cache(cache, saved)
    message, hint = refused(cache / "snapshots" if snapshots else cache)
    assert "is a folder of the hub's cache" in message
    assert f"name the model org/tiny, or {cache / 'snapshots' / COMMIT}" in hint


def test_offline_names_the_revision_and_what_the_cache_has(cache, saved):  # noqa: F811
    fill_cache(cache, saved)
    message, hint = refused("org/tiny", offline=True, revision="v2")
    assert message == "org/tiny at revision v2 is not in the local cache, and the hub may not be asked (offline)"
    assert "hf download org/tiny --revision v2" in hint and "the cache holds main" in hint
    shutil.rmtree(cache)
    message, hint = refused("org/tiny", offline=True)
    assert "revision" not in message + hint and "the cache holds" not in hint


@pytest.mark.parametrize("shards", [False, True])
def test_a_download_that_is_not_finished(dead_hub, cache, saved, shards):  # noqa: F811
    fill_cache(cache, saved)
    at = cache / "snapshots" / COMMIT
    (at / "model.safetensors").unlink()
    if shards:
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (at / "model.safetensors.index.json").write_text(json.dumps(index))
    message, hint = refused("org/tiny")
    assert ("the download of org/tiny is not finished" if shards else "no safetensors weights") in message
    assert "hf download org/tiny" in hint
    local = cache.parent / "local"
    shutil.copytree(at, local)
    (local / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (local / ".cache" / "huggingface" / "download" / "x.incomplete").touch()
    message, hint = refused(local)
    assert f"the download of {local} is not finished" in message and "hf download" in hint


@pytest.mark.parametrize(
    "name, original",
    [
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-7B-Instruct-GPTQ-Int4", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("unsloth/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen/Qwen3-VL-4B-Instruct-FP8", "Qwen/Qwen3-VL-4B-Instruct"),
        ("ggml-org/Qwen2.5-VL-7B-Instruct-GGUF", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("mlx-community/Qwen2.5-VL-3B-Instruct-8bit", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen/Qwen2.5-VL-3B-Instruct", None),
        ("org/my-awqward-model", None),
        ("org/thing-GGUF", ""),
    ],
)
def test_the_original_of_a_quantised_name(name, original):
    assert original_of(name) == original


def test_quantised_names_are_known_before_the_download(hub, cache):  # noqa: F811
    _, hint = refused("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", offline=True)
    assert hint.startswith(
        "its name is that of quantized weights, which evoprune does not read; take Qwen/Qwen2.5-VL-7B-"
    )
    edit(hub.folder / "config.json", quantization_config={"quant_method": "awq"})
    assert "holds quantized weights (awq)" in refused("org/tiny")[0]
    assert not any("safetensors" in path for path in hub.requests)
    (hub.folder / "config.json").unlink()
    assert "no config.json on the hub" in refused("org/tiny")[0]


@pytest.mark.parametrize(
    "prefix, known, hint",
    [
        ("module.", False, "DistributedDataParallel"),
        ("_orig_mod.", False, "torch.compile"),
        ("base_model.model.", False, "merge_and_unload"),
        ("", True, "MLX"),
    ],
)
def test_names_of_tensors_from_elsewhere(folder, prefix, known, hint):
    weights = load_file(folder / "model.safetensors")
    if known:
        new = {name.replace("visual.", "vision_tower."): each for name, each in weights.items() if "visual" in name}
        new |= {f"language_model.{name}": each for name, each in weights.items() if "visual" not in name}
    else:
        new = {prefix + name: each for name, each in weights.items()}
    save_file(new, folder / "model.safetensors", {"format": "pt"})
    assert hint in refused(folder)[1]
