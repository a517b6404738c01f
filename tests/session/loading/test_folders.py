"""Test models from a local imitation of the hub, generation_config.json, and damaged, incomplete or malicious folders."""

import hashlib
import json
import os
import shutil
import socket
import threading
import time
import warnings
from contextlib import nullcontext
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from evoprune.batch import RowReader
from evoprune.bench import EvalSettings, Evaluation, TuneSettings, Tuning
from evoprune.bench.verify.subject import QUESTION, SAMPLING, Subject
from evoprune.errors import LFS_HINT, ModelError, ModelWarning, UsageError, VideoError
from evoprune.language import Prompt, template
from evoprune.session import hub as hub_module
from evoprune.session.hub import kind_hint
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import load_model as load
from evoprune.session.loading.weights import weights_of
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.published import MODEL_HINT
from evoprune.session.session import Session
from evoprune.util import from_keywords
from evoprune.video import probe
from evoprune.video.readers import subtitles
from evoprune.video_qa import VideoQA
from tests.loading import edit, error_of, load_model, no_network
from tests.tiny import save_tiny, tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """Implements the part of the hub's HTTP interface that downloads need, and serves a single folder as org/tiny."""

    protocol_version = "HTTP/1.1"
    folder = None
    requests = ()

    def do_GET(self):
        self.requests.append(self.path)
        files = {file.name: file.read_bytes() for file in self.folder.iterdir()}
        parts = self.path.split("?")[0].split("/")
        if "org/tiny" not in self.path:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in self.path:
            self.answer_json([{"type": "file", "path": k, "size": len(v), "oid": k} for k, v in files.items()])
        elif "/api/models/" in self.path:
            self.answer_json({"id": "org/tiny", "sha": COMMIT, "siblings": []})
        elif parts[4] not in ("main", COMMIT):
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif parts[-1] not in files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            body = files[parts[-1]]
            self.answer(200, body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})

    do_HEAD = do_GET  # noqa: N815

    def answer_json(self, content):
        self.answer(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def move_hub(monkeypatch, port):
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Set up an empty cache for models from the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "cache" / "models--org--tiny"


@pytest.fixture
def hub(folder, cache, monkeypatch):
    handler = type("Handler", (Hub,), {"folder": folder, "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    move_hub(monkeypatch, server.server_port)
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def dead_hub(cache, monkeypatch):
    move_hub(monkeypatch, 1)


def fill_cache(cache, saved):
    shutil.copytree(saved, cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT)


def test_a_hub_model_is_downloaded_once(hub, monkeypatch):
    loaded = load_model("org/tiny", dtype="fp32")
    assert (loaded.id, loaded.description.commit) == ("org/tiny", COMMIT)
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)
    hub.requests.clear()
    assert load_model("org/tiny", revision=COMMIT).description.commit == COMMIT
    assert not any("safetensors" in path for path in hub.requests)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert load_model("org/tiny", offline=True).description.commit == COMMIT


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("org/tiny", {}, "of type 'llava'"),
        ("org/other", {}, "the hub has no such model"),
        ("org/tiny", {"revision": "v9"}, "no revision 'v9'"),
    ],
)
def test_what_the_hub_has_and_cannot_run_or_does_not_have(hub, name, options, says):
    edit(hub.folder / "config.json", model_type="llava")
    assert says in error_of(name, **options)
    assert not any("safetensors" in path for path in hub.requests)


def test_without_the_hub_the_cache_serves(dead_hub, cache, saved, monkeypatch):
    monkeypatch.setattr(hub_module, "HUB_SECONDS", 60.0)
    began = time.monotonic()
    assert "the hub cannot be reached" in error_of("org/tiny")
    assert time.monotonic() - began < 20  # there is one request, without retries
    fill_cache(cache, saved)
    assert load_model("org/tiny").description.commit == COMMIT
    shutil.rmtree(cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the hub's own switch
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert "offline mode" in error_of("org/tiny")


@pytest.mark.parametrize("stuck", ["server", "names"])
def test_a_hub_that_does_not_answer_fails_soon(cache, monkeypatch, stuck):
    monkeypatch.setattr(hub_module, "HUB_SECONDS", 0.3)
    released = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        move_hub(monkeypatch, silent.getsockname()[1])
        if stuck == "names":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [] if released.wait(60) else None)
        began = time.monotonic()
        try:
            message = error_of("org/tiny")
        finally:
            released.set()
        assert "the hub cannot be reached" in message and (stuck == "server" or "no response within 0.3 s" in message)
        assert time.monotonic() - began < 20


def test_offline_uses_the_cache_and_no_network(cache, saved, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    message, hint = refused("org/tiny", offline=True)
    assert "(offline)" in message and "revision" not in message + hint and "the cache has" not in hint
    fill_cache(cache, saved)
    loaded = load_model("org/tiny", offline=True)
    assert loaded.description.commit == COMMIT and loaded.tokenizer is not None
    message, hint = refused("org/tiny", offline=True, revision="v2")
    assert message == "org/tiny at revision v2 is not in the local cache, and network access is disabled (offline)"
    assert "hf download org/tiny --revision v2" in hint and "the cache has main" in hint


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4242\n"


def refused(name, **options):
    with pytest.raises(ModelError) as caught:
        load_model(str(name), **options)
    return caught.value.message, caught.value.hint


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"])
def test_a_git_lfs_pointer_of_a_model(folder, name):
    (folder / name).write_text(POINTER)
    message, hint = refused(folder)
    assert f"{folder / name} is a git-lfs pointer" in message and hint == LFS_HINT


def test_git_lfs_pointers_of_clips_and_beside_them(tmp_path):
    (tmp_path / "frames").mkdir()
    for name in ("clip.mp4", "picture.png", "frames/1.jpg", "frames/2.jpg", "lines.srt", "rows.jsonl"):
        (tmp_path / name).write_text(POINTER)
    for error, read in (
        *((VideoError, partial(probe, tmp_path / name)) for name in ("clip.mp4", "picture.png", "frames")),
        (VideoError, lambda: subtitles.read(str(tmp_path), 0.0, str(tmp_path / "lines.srt"), 0.0, 1.0)),
        (UsageError, lambda: RowReader().load(str(tmp_path / "rows.jsonl"))),
    ):
        with pytest.raises(error, match="is a git-lfs pointer") as caught:
            read()
        assert caught.value.hint == LFS_HINT


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "mrope_section": [2, 3, 3]}
WINDOW = {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None, "sliding_window": 64}


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"text_config": {"rope_parameters": YARN}}, "rope_type 'yarn' is not supported"),
        # Takes precedence over rope_parameters, as in transformers.
        ({"text_config": {"rope_scaling": YARN}}, "rope_type 'yarn' is not supported"),
        ({"rope_scaling": YARN | {"type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"text_config": WINDOW}, "sliding window attention is not supported"),
        ({"text_config": {"hidden_act": "gelu"}}, "activation gelu is not supported"),
    ],
)
def test_what_cannot_run_is_not_called_damaged(folder, changes, reason):
    content = json.loads((folder / "config.json").read_text())
    for name, value in changes.items():
        content[name] = content.get(name, {}) | value
    (folder / "config.json").write_text(json.dumps(content))
    message, hint = refused(folder)
    assert message.startswith(f"evoprune cannot run {folder}: {reason}") and "again" not in hint
    assert ("config.json without yarn" in hint) == ("yarn" in reason)


def test_an_adapter_is_no_model(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "Qwen/Qwen2.5-VL-3B-Instruct"}))
    message, hint = refused(folder)
    assert message == f"{folder} contains an adapter of Qwen/Qwen2.5-VL-3B-Instruct, not a model"
    assert "merge_and_unload" in hint


def test_a_folder_of_the_hubs_cache(cache, saved):
    fill_cache(cache, saved)
    for folder in (cache, cache / "snapshots"):
        message, hint = refused(folder)
        assert "is a folder in the hub's cache" in message
        assert f"use org/tiny, or {cache / 'snapshots' / COMMIT}" in hint


@pytest.mark.parametrize("shards", [False, True])
def test_a_download_that_is_not_finished(dead_hub, cache, saved, shards):
    fill_cache(cache, saved)
    at = cache / "snapshots" / COMMIT
    (at / "model.safetensors").unlink()
    if shards:
        index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
        (at / "model.safetensors.index.json").write_text(json.dumps(index))
    message, hint = refused("org/tiny")
    assert ("the download of org/tiny is incomplete" if shards else "no safetensors weights") in message
    assert "hf download org/tiny" in hint
    local = cache.parent / "local"
    shutil.copytree(at, local)
    (local / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (local / ".cache" / "huggingface" / "download" / "x.incomplete").touch()
    message, hint = refused(local)
    assert f"the download of {local} is incomplete" in message and "hf download" in hint


ORIGINAL = {  # the original repository, by the name of a repository with converted weights
    "unsloth/Qwen3.6-35B-A3B-MLX-8bit": "Qwen/Qwen3.6-35B-A3B",
    "org/Qwen2.5-VL-3B-Instruct-mlx": "Qwen/Qwen2.5-VL-3B-Instruct",
    "mlx-community/Qwen2.5-VL-3B-Instruct-8bit": "Qwen/Qwen2.5-VL-3B-Instruct",
    "org/thing-mlx": "the original checkpoint",
}
GGUF = ("unsloth/Qwen3.5-35B-A3B-GGUF", "ggml-org/Qwen2.5-VL-7B-Instruct-GGUF", "org/thing-GGUF")
OTHERS = ("org/my-awqward-model", "openai/whisper-base", "Qwen/Qwen3-4B", "Qwen/Qwen2.5-7B-Instruct")
KNOWN = (
    "Qwen/Qwen3.5-4B",
    "Qwen/Qwen3.6-27B",
    "Qwen/Qwen3.8-27B-FP8",
    "Qwen/Qwen3.8-Flash-Next",
    "Qwen/Qwen2.5-VL-7B-Instruct-AWQ",
    "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen2.5-VL-3B-Instruct",
    "org/qwen2-vl-tuned",
    "org/my_qwen25vl",
)


def test_what_a_name_says_of_its_model():
    unread = "the name suggests MLX weights, which evoprune does not support; use {}; "
    assert {name: kind_hint(name) for name in ORIGINAL} == {k: unread.format(v) for k, v in ORIGINAL.items()}
    assert all(f"hf download {name} --include" in kind_hint(name) for name in GGUF)
    assert {kind_hint(name) for name in OTHERS} == {f"{MODEL_HINT}; "}
    assert {kind_hint(name) for name in KNOWN} == {""}


@pytest.mark.parametrize(
    ("options", "streams", "says", "hint"),
    [
        ({"engine": "transformers"}, True, "cannot forget the oldest tokens", "leave the engine out"),
        ({"engine": "transformers", "method": "pyramiddrop"}, False, "acts inside the language model", "engine out"),
        ({"method": "cdpruner"}, True, "cannot prune a stream", "without the question"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_the_download(hub, options, streams, says, hint):
    loading, pruning = from_keywords({"model": "org/tiny"} | options, ModelOptions, PruneOptions)
    with pytest.raises(UsageError, match=says) as caught:
        Session.load(loading, pruning, streams=streams)
    assert hint in caught.value.hint
    assert hub.requests and not any("safetensors" in path for path in hub.requests)


@pytest.mark.parametrize("kind", [Evaluation, Tuning])
def test_methods_to_compare_are_refused_before_the_download(hub, kind):
    options = {"methods": ("pyramiddrop",), "model": ModelOptions("org/tiny", engine="transformers")}
    if kind is Evaluation:
        run = Evaluation(EvalSettings(data="a.jsonl", budgets=(0.25,), **options), [])
    else:
        run = Tuning(TuneSettings(("a.mp4",), **options))
    with pytest.raises(UsageError, match="acts inside the language model"):
        run.load()
    assert hub.requests and not any("safetensors" in path for path in hub.requests)


def test_quantised_names_are_known_before_the_download(hub, cache):
    _, hint = refused("org/thing-GGUF", offline=True)
    assert hint.startswith("evoprune runs GGUF files from a folder: hf download org/thing-GGUF")
    edit(hub.folder / "config.json", quantization_config={"quant_method": "hqq"})
    assert "hqq and accelerate are not installed" in refused("org/tiny")[0]
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


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"  # names that transformers writes


def change(folder, edited):
    """Let `edited` change the dictionary of weights in a folder, and write it back."""
    weights = load_file(folder / "model.safetensors")
    edited(weights)
    save_file(
        {name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def assert_as_transformers(folder):
    loaded = load_model(str(folder), dtype="fp32")
    expected = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
    return loaded


@pytest.mark.parametrize(
    "edited, apart",
    [
        (lambda weights: weights.update({HEAD: weights[EMBEDDINGS].roll(1, 0)}), True),
        (lambda weights: weights.update({HEAD: weights[EMBEDDINGS]}), False),
        (lambda weights: weights.pop(EMBEDDINGS), False),
    ],
    ids=["other", "same", "alone"],
)
def test_an_output_layer_in_the_file_under_tied_embeddings(folder, edited, apart):
    change(folder, edited)
    edit(folder / "config.json", tie_word_embeddings=True)
    loaded = assert_as_transformers(folder)
    model = loaded.model
    assert model.config.tie_word_embeddings is not apart
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) is not apart
    assert weights_of(describe(ModelOptions(str(folder)))).parameters == sum(w.numel() for w in model.parameters())
    if apart:
        assert load_model(str(folder), load_format="dummy").model.config.tie_word_embeddings


def test_a_tensor_that_is_not_read_is_named_once(folder):
    def more(weights):
        weights["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 64)
        weights["value_head.bias"] = torch.zeros(1)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # buffers of older versions
        weights["visual.rotary_pos_emb.inv_freq"] = torch.zeros(8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # complete checkpoints cause no warning
        load_model(str(folder))
    change(folder, more)
    with pytest.warns(ModelWarning) as said:
        load_model(str(folder))
    (only,) = said
    assert str(only.message).startswith(f"2 tensors of the weights in {folder} are not used: ")
    assert "q_proj.lora_A.weight, value_head.bias" in str(only.message)


def test_a_tensor_under_two_names_is_refused_where_they_differ(folder):
    old, new = "visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"
    change(folder, lambda weights: weights.update({new: weights[old].clone()}))
    assert_as_transformers(folder)
    change(folder, lambda weights: weights.update({new: weights[old] + 1}))
    assert f"{new} is stored twice" in error_of(folder)


def in_shards(folder, family):
    """Split a tiny model's weights into two indexed files. Returns the weights and the two paths."""
    save_tiny(folder, family=family)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, files = list(weights), [folder / f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    for part, file in enumerate(files):
        save_file({name: weights[name] for name in names[part::2]}, file, {"format": "pt"})
    index = {name: files[place % 2].name for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return weights, files


@pytest.mark.parametrize("renamed", [False, True])
@pytest.mark.parametrize("place", [0, 1])
def test_the_index_says_which_copy_of_a_tensor_counts(tmp_path, place, renamed):
    """A shard has an old copy of a tensor, perhaps under an older name, and another file is not in the index at all."""
    weights, files = in_shards(tmp_path, "qwen2_5_vl")
    shard = load_file(files[place])
    name = next(name for name in weights if "visual.blocks" in name and name not in shard)
    other = name.removeprefix("model.") if name.startswith("model.") else f"model.{name}"
    save_file(shard | {other if renamed else name: weights[name] + 1}, files[place])
    save_file({name: weight + 1 for name, weight in weights.items()}, tmp_path / "model-old.safetensors")
    read = dict(load_model(str(tmp_path), dtype="fp32").model.named_parameters())
    assert torch.equal(read[f"model.{name.removeprefix('model.')}"], weights[name])


@pytest.mark.parametrize("same", [True, False])
def test_transformers_would_ignore_the_index(tmp_path, same):
    weights, files = in_shards(tmp_path, "qwen3_5_moe")
    shard = load_file(files[1])
    name = next(name for name in weights if name not in shard)
    save_file(shard | {name: weights[name] if same else weights[name] + 1}, files[1])
    if same:
        assert load_model(str(tmp_path), engine="transformers").model
    else:
        error = error_of(tmp_path, engine="transformers")
        assert f"{files[1]} contains a different copy of {name} than {files[0].name}" in error


@pytest.mark.filterwarnings("error::evoprune.errors.ModelWarning")
def test_layers_that_predict_several_tokens_are_ignored(tmp_path):
    folder = save_tiny(tmp_path, family="qwen3_5")
    change(folder, lambda weights: weights.update({"mtp.fc.weight": torch.ones(2, 2)}))
    assert load_model(str(folder)).facts().engine == "native"


@pytest.mark.filterwarnings("error::evoprune.errors.ModelWarning")
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_layer_for_multi_token_prediction_is_loaded(tmp_path, family):
    folder = save_tiny(tmp_path, family=family, mtp=True)
    stored = load_file(folder / "model.safetensors")
    weights = load_model(str(folder), dtype="fp32").model.state_dict()
    own = {name for name in weights if name.startswith("mtp.")}
    assert len(own) > 14 and own == {name for name in stored if name.startswith("mtp.")}
    assert all(torch.equal(weights[name], stored[name]) for name in own)
    described = weights_of(describe(ModelOptions(str(folder), dtype="fp32")))
    assert described.parameters == sum(
        weight.numel() for weight in {id(each): each for each in weights.values()}.values()
    )
    unread = weights["model.language_model.embed_tokens.weight"].nbytes  # mapped, and not the output layer
    assert described.bytes == 4 * described.parameters - unread
    # transformers saves neither the tensors nor, in older versions, the settings
    change(folder, lambda weights: [weights.pop(name) for name in own])
    without = weights_of(describe(ModelOptions(str(folder), dtype="fp32")))
    assert described.parameters - without.parameters == sum(stored[name].numel() for name in own)
    assert not hasattr(load_model(str(folder)).model, "mtp")


@pytest.mark.filterwarnings("error::evoprune.errors.ModelWarning")
@pytest.mark.parametrize(
    "text",
    [{"mtp_num_hidden_layers": 2}, {"mtp_num_hidden_layers": 0}, {"mtp_use_dedicated_embeddings": True}],
    ids=str,
)
def test_other_layers_for_multi_token_prediction_are_ignored(tmp_path, text):
    folder = save_tiny(tmp_path, family="qwen3_5", mtp=True)
    content = json.loads((folder / "config.json").read_text())
    content["text_config"] |= text
    (folder / "config.json").write_text(json.dumps(content))
    assert not hasattr(load_model(str(folder)).model, "mtp")


def test_transformers_runs_no_layer_for_multi_token_prediction(tmp_path):
    folder = save_tiny(tmp_path, family="qwen3_5_moe", mtp=True)
    described = weights_of(describe(ModelOptions(str(folder), engine="transformers")))
    assert (
        described.parameters
        == weights_of(describe(ModelOptions(str(save_tiny(tmp_path / "plain", family="qwen3_5_moe"))))).parameters
    )
    loaded = load_model(str(folder), engine="transformers")
    assert loaded.facts().engine == "transformers" and loaded.language.mtp_layer() is None


@pytest.mark.parametrize("name", ["mtp.fc.weight", "mtp.layers.0.mlp.down_proj.weight"])
def test_a_damaged_layer_for_multi_token_prediction(tmp_path, name):
    folder = save_tiny(tmp_path, family="qwen3_5", mtp=True)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: weights[name][1:]}, folder / "model.safetensors", {"format": "pt"})
    assert f"{name} is float32 [63, 128], but config.json expects [64, 128]" in error_of(folder)
    del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.warns(ModelWarning, match=f"lack 1 tensor of the layer for multi-token prediction, first {name}"):
        loaded = load_model(str(folder))
    assert not hasattr(loaded.model, "mtp") and VideoQA(loaded).encode("samples/square.mp4").ask("What happens?").text


def test_shards_without_an_index_are_named(tmp_path):
    _, files = in_shards(tmp_path, "qwen2_5_vl")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert f"{tmp_path} contains {files[0].name}, {files[1].name}, but no model.safetensors.index.json" in error_of(
        tmp_path
    )


def test_an_adapter_beside_the_weights_is_said(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 64)}, folder / "adapter_model.safetensors")
    with pytest.warns(ModelWarning, match=r"the adapter next to the weights in .* \(adapter_config.json\) is ignored"):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name, value", [("quantization_config", None), ("dtype", None), ("text_config", {"quantization_config": None})]
)
def test_null_in_a_config_is_missing(folder, name, value):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content[name] = content[name] | value if value else value
    path.write_text(json.dumps({"torch_dtype": "float32"} | content))
    assert load_model(str(folder)).model is not None
    assert describe(ModelOptions(str(folder))).stored_dtype == "fp32"


@pytest.fixture(autouse=True)
def soon():
    """Limit each test to half a minute, for busy machines. Most take less than a second (see `--durations=0`)."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


TEXT, VISION = "text_config", "vision_config"
CONFIG = {
    # Entry of config.json: value, and the error message.
    "num_hidden_layers of a billion": (TEXT, "num_hidden_layers", 10**9, "not a whole number from 1 to 1,000"),
    "more layers than weights": (TEXT, "num_hidden_layers", 900, "lack model.language_model.layers.899"),
    "deeper than the weights": (VISION, "depth", 900, "lack model.visual.blocks.899"),
    "other dimensions": (TEXT, "intermediate_size", 64, "cannot be loaded"),
    "huge matrices": (TEXT, "intermediate_size", 2**62, "intermediate_size is 4611686018427387904"),
}
VIDEO, IMAGE = "video_preprocessor_config.json", "preprocessor_config.json"
ENDS, WORDS = "generation_config.json", "tokenizer_config.json"
FILES = {
    # Content: name, entries or text, and the error message.
    "one mean": (IMAGE, {"image_mean": [1]}, "image_mean is [1], not a list of 3"),
    "no deviation": (VIDEO, {"image_std": [0, 0, 0]}, "image_std is [0, 0, 0]"),
    "size is a word": (VIDEO, {"size": "big"}, "size is 'big', not an object"),
    "edge is a word": (VIDEO, {"size": {"shortest_edge": "big"}}, "min_pixels is 'big'"),
    "no pixels": (VIDEO, {"max_pixels": -1}, "max_pixels is -1"),
    "no frames": (VIDEO, {"max_frames": -1}, "max_frames is -1"),
    "one frame": (VIDEO, {"max_frames": 1}, "max_frames is 1"),
    "half a frame": (VIDEO, {"min_frames": 1.5}, "min_frames is 1.5"),
    "fps is no number": (VIDEO, {"fps": float("nan")}, "NaN is not a valid JSON number"),
    "fps of nothing": (VIDEO, {"fps": -2}, "fps is -2"),
    "joint file": ("processor_config.json", '{"video_processor": 3}', "video_processor is 3, not an object"),
    "ends in words": (ENDS, {"eos_token_id": ["<|im_end|>"]}, "eos_token_id is ['<|im_end|>']"),
    "deep settings": (ENDS, '{"a":' * 10**5, "nested more than"),
    "deep config": ("config.json", "[" * 10**5, "nested more than"),
    "deep tokenizer settings": (WORDS, "[" * 10**5, "nested more than"),
    "template is a number": ("chat_template.json", '{"chat_template": 3}', "chat_template is 3, not a string"),
    "bytes that are no text": ("config.json", b"\xff\xfe\0", "utf-8"),
}
WEIGHTS = {
    # weight_map of the index, and the error message.
    "a list": ([1], "weight_map is [1], not an object"),
    "numbers": ({"a": 1}, "weight_map.a is 1, not the name of a file"),
    "another folder": ({"a": "../other/model.safetensors"}, "weight_map.a is '../other/model.safetensors'"),
    "somewhere else": ({"a": "/etc/passwd"}, "weight_map.a is '/etc/passwd'"),
    "Windows": ({"a": "C:x"}, "weight_map.a is 'C:x'"),
    "itself": ({"a": "."}, "is missing"),
    "a pipe": ({"a": "pipe"}, "pipe is missing"),
}


def said_of(folder: Path, file: str, says: str) -> None:
    message = error_of(folder)
    assert says in message
    assert file in message or str(folder) in message


@pytest.mark.parametrize(("part", "name", "value", "says"), CONFIG.values(), ids=CONFIG)
def test_numbers_of_a_config(folder, part, name, value, says):
    content = json.loads((folder / "config.json").read_text())
    content[part][name] = value
    (folder / "config.json").write_text(json.dumps(content))
    said_of(folder, "config.json", says)


@pytest.mark.few(9)
@pytest.mark.parametrize(("name", "content", "says"), FILES.values(), ids=FILES)
def test_settings(folder, name, content, says):
    if name == "chat_template.json":
        (folder / "chat_template.jinja").unlink()
    if isinstance(content, dict):
        edit(folder / name, **content)
    else:
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    said_of(folder, name, says)


@pytest.mark.parametrize(("weight_map", "says"), WEIGHTS.values(), ids=WEIGHTS)
def test_weights_are_files_of_the_folder(folder, weight_map, says):
    os.mkfifo(folder / "pipe")
    shutil.copytree(folder, folder.parent / "other", ignore=lambda *_: ["pipe"])
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    said_of(folder, "model.safetensors.index.json", says)


@pytest.mark.few(8)
@pytest.mark.parametrize("name", ["config.json", VIDEO, ENDS, WORDS, "chat_template.jinja", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "circle", "100 GB"])
def test_what_is_no_file_or_too_large_a_one(folder, name, kind):
    if kind == "100 GB":
        os.truncate(folder / name, 10**11)
    else:
        (folder / name).unlink()
        os.mkfifo(folder / name) if kind == "pipe" else (folder / name).symlink_to(name)
    said_of(folder, name, "MiB" if kind == "100 GB" else "")


def test_more_tokens_than_embeddings(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["?"] = 10**6
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="produced token 1000000, but the model has only 4"):
        VideoQA.load(str(folder)).encode("samples/square.mp4").ask("What?", max_new_tokens=1).text  # noqa: B018


BOMB = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}


def test_steps_of_a_tokenizer_that_multiply(folder):
    whole = (folder / "tokenizer.json").read_text()
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [BOMB] * 9})
    assert "normalizer is Sequence" in error_of(folder)
    (folder / "tokenizer.json").write_text(whole)
    edit(folder / "tokenizer.json", decoder=BOMB)
    assert "decoder is Replace, not ByteLevel" in error_of(folder)


def test_a_pattern_that_takes_too_many_steps(folder, capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+c"}, "behavior": "Isolated", "invert": False}
    edit(folder / "tokenizer.json", pre_tokenizer=split)
    tokenizer = load(str(folder), pack=False).tokenizer
    with pytest.raises(ModelError, match=r"crashed: .*limit"):
        Prompt.build(tokenizer, "a" * 99, [("video", 1)])


def test_a_device_that_computes_nothing(folder):
    with pytest.raises(UsageError, match="meta"):
        VideoQA.load(str(folder), device="meta")


# --- chat templates ---

LOOPS = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
TEMPLATES = {
    "10 GB": ("{{ 'x' * 10**10 }}", "too much memory"),
    "10 GB by a filter": ("{{ 'x' | center(10**10) }}", "too much memory"),
    "long": ("{{ 'x' * 2000000 }}", "its output has 2,000,000 characters"),
    "deep": ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "nested too deeply"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deeply"),
}


def refusal(folder: Path, source: str) -> str:
    (folder / "chat_template.jinja").write_text(source)
    tokenizer = load(str(folder), pack=False).tokenizer
    with pytest.raises(ModelError) as caught:
        Prompt.build(tokenizer, "What?", [("video", 1)])
    assert str(folder / "chat_template.jinja") in caught.value.message
    return caught.value.message


@pytest.mark.few(2)
@pytest.mark.parametrize(("source", "says"), TEMPLATES.values(), ids=TEMPLATES)
def test_templates_that_take_too_much(folder, source, says):
    assert says in refusal(folder, source)


@pytest.mark.full
@pytest.mark.parametrize("source", [LOOPS, "{{ 3 ** (3 ** 30) }}"], ids=["loops", "a power, which sees no signal"])
def test_templates_without_an_end(folder, source, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 1)
    assert "does not finish" in refusal(folder, source)


def test_a_template_is_rendered_once(folder, monkeypatch):
    tokenizer = load(str(folder), pack=False).tokenizer
    Prompt.build(tokenizer, "What?", [("video", 1)])
    monkeypatch.setattr(template, "run_isolated", partial(pytest.fail, "a second process"))
    Prompt.build(tokenizer, "Why?", [("video", 1)])


CLIP = "samples/square.mp4"


@pytest.mark.parametrize("penalty", [None, 1.0, 1.5])
def test_the_models_own_repetition_penalty_is_applied_as_in_transformers(folder, penalty):
    edit(folder / "generation_config.json", repetition_penalty=1.3)
    loaded = load_model(str(folder), dtype="fp32")
    encoded = VideoQA(loaded, budget=1.0, method="none").encode(CLIP, **vars(SAMPLING))
    answer = encoded.ask(QUESTION, max_new_tokens=24, repetition_penalty=penalty)
    assert answer.text and answer.report.generation["repetition_penalty"] == (penalty or 1.3)
    subject = Subject(loaded, CLIP, CLIP)
    asked = subject.about(CLIP)
    length = len(asked.prompt.input_ids)
    places = torch.cat([torch.arange(length)[None], asked.positions])[:, None]
    how = {} if penalty is None else {"repetition_penalty": penalty}
    ids = subject.transformers.generate(**asked.call, position_ids=places, do_sample=False, max_new_tokens=24, **how)
    made = [i for i in ids[0, length:].tolist() if i not in loaded.eos_ids]
    assert answer.ids == made and len(made) > 3


@pytest.mark.parametrize(
    "asked, said",
    [
        ({}, None),
        ({"num_beams": 1, "do_sample": None, "top_k": None, "max_new_tokens": 8, "repetition_penalty": None}, None),
        ({"num_beams": 4, "no_repeat_ngram_size": 3}, "no_repeat_ngram_size and num_beams"),
        ({"suppress_tokens": [1, 2], "min_p": 0.1}, "min_p and suppress_tokens"),
        ({"watermarking_config": {"bias": 3.0}}, "watermarking_config"),
    ],
)
def test_settings_that_are_not_done_are_said_once(folder, asked, said):
    edit(folder / "generation_config.json", **asked)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_model(str(folder))
    expected = [] if said is None else [f"ignored settings in {folder}/generation_config.json: {said}"]
    assert [str(each.message) for each in caught if each.category is ModelWarning] == expected


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("repetition_penalty", 0), ("temperature", -1), ("top_p", 2), ("top_k", "many"), ("do_sample", "yes")],
)
def test_settings_out_of_range_are_refused(folder, name, wrong):
    edit(folder / "generation_config.json", **{name: wrong})
    assert f"generation_config.json is damaged: {name} is " in error_of(folder)


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_an_answer_must_be_able_to_end(folder, where):
    never = 1_000_000_000
    if where == "config.json":
        (folder / "generation_config.json").unlink()
        content = json.loads((folder / where).read_text())
        content["text_config"]["eos_token_id"] = never
        (folder / where).write_text(json.dumps(content))
    else:
        edit(folder / where, eos_token_id=[never])
    said = f"{folder}/{where}: eos_token_id {never} is not in the vocabulary, so no answer would end"
    assert said in error_of(folder)


@pytest.mark.parametrize(
    ("ends", "expected"),
    [(7, (7,)), ([7, 8], (7, 8)), ([8, 7] * 5000, (8, 7)), ([7, 5000], (7,)), ([], (400,)), (None, (400,))],
)
def test_end_tokens(folder, ends, expected):
    """If some ids are valid, the invalid ones only cause a warning."""
    edit(folder / "generation_config.json", eos_token_id=ends)
    wrong = pytest.warns(ModelWarning, match="eos_token_id 5000 is not in the vocabulary")
    with wrong if ends == [7, 5000] else nullcontext():
        assert load_model(str(folder)).eos_ids == expected


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_thousands_of_end_tokens_are_refused(folder, where):
    (folder / "generation_config.json").write_text("{}")
    edit(folder / where, eos_token_id=[*range(60_000)])
    assert "eos_token_id is [0, 1, 2, 3, 4, 5, ...], not a whole number" in error_of(folder)
