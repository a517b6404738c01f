"""Models from the hub, played by a server on this machine; and folders that do not load, or not all of them."""

import hashlib
import json
import shutil
import socket
import threading
import time
import warnings
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from evoprune.batch.rows import load_rows
from evoprune.errors import LFS_HINT, ModelError, ModelWarning, UsageError, VideoError
from evoprune.session.loading import find
from evoprune.session.loading.find import describe_model
from evoprune.session.options import ModelOptions
from evoprune.video.frames import probe
from evoprune.video.readers import subtitles
from tests.loading import edit, error_of, load_model, no_network
from tests.tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's HTTP interface as a download needs, serving one folder as org/tiny."""

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
    """Points the hub's client at a port of this machine."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache on this machine, empty."""
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
    assert (loaded.id, loaded.revision) == ("org/tiny", COMMIT)
    assert torch.equal(loaded.model.lm_head.weight, tiny_model().lm_head.weight)
    hub.requests.clear()
    assert load_model("org/tiny", revision=COMMIT).revision == COMMIT
    assert not any("safetensors" in path for path in hub.requests)
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert load_model("org/tiny", offline=True).revision == COMMIT


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("org/tiny", {}, "of type 'llava'"),
        ("org/other", {}, "no such model on the hub"),
        ("org/tiny", {"revision": "v9"}, "no revision 'v9'"),
    ],
)
def test_what_the_hub_has_and_cannot_run_or_does_not_have(hub, name, options, says):
    edit(hub.folder / "config.json", model_type="llava")
    assert says in error_of(name, **options)
    assert not any("safetensors" in path for path in hub.requests)


def test_without_the_hub_the_cache_serves(dead_hub, cache, saved, monkeypatch):
    began = time.monotonic()
    assert "the hub cannot be reached" in error_of("org/tiny")
    assert time.monotonic() - began < 3
    fill_cache(cache, saved)
    assert load_model("org/tiny").revision == COMMIT
    shutil.rmtree(cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # the hub's own switch
    monkeypatch.setattr(socket.socket, "connect", no_network)
    assert "offline mode" in error_of("org/tiny")


@pytest.mark.parametrize("stuck", ["server", "names"])
def test_a_hub_that_does_not_answer_fails_soon(cache, monkeypatch, stuck):
    monkeypatch.setattr(find, "HUB_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        move_hub(monkeypatch, silent.getsockname()[1])
        if stuck == "names":
            monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: time.sleep(2))
        began = time.monotonic()
        message = error_of("org/tiny")
        assert "the hub cannot be reached" in message and (stuck == "server" or "no answer within 0.3 s" in message)
        assert time.monotonic() - began < (1.5 if stuck == "names" else 3)


def test_offline_uses_the_cache_and_no_network(cache, saved, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", no_network)
    message, hint = refused("org/tiny", offline=True)
    assert "(offline)" in message and "revision" not in message + hint and "the cache holds" not in hint
    fill_cache(cache, saved)
    loaded = load_model("org/tiny", offline=True)
    assert loaded.revision == COMMIT and loaded.tokenizer is not None
    message, hint = refused("org/tiny", offline=True, revision="v2")
    assert message == "org/tiny at revision v2 is not in the local cache, and the hub may not be asked (offline)"
    assert "hf download org/tiny --revision v2" in hint and "the cache holds main" in hint


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
        (VideoError, lambda: subtitles.read("clip.mp4", 0.0, str(tmp_path / "lines.srt"), 0.0, 1.0)),
        (UsageError, lambda: load_rows(str(tmp_path / "rows.jsonl"))),
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
        # counts more than rope_parameters, as in transformers
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
    assert message == f"{folder} holds an adapter of Qwen/Qwen2.5-VL-3B-Instruct, not a model"
    assert "merge_and_unload" in hint


def test_a_folder_of_the_hubs_cache(cache, saved):
    fill_cache(cache, saved)
    for folder in (cache, cache / "snapshots"):
        message, hint = refused(folder)
        assert "is a folder of the hub's cache" in message
        assert f"name the model org/tiny, or {cache / 'snapshots' / COMMIT}" in hint


@pytest.mark.parametrize("shards", [False, True])
def test_a_download_that_is_not_finished(dead_hub, cache, saved, shards):
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


ORIGINAL = {  # what is to be taken instead of weights of a name that are quantised
    "Qwen/Qwen2.5-VL-7B-Instruct-AWQ": "Qwen/Qwen2.5-VL-7B-Instruct",
    "Qwen/Qwen2.5-VL-7B-Instruct-GPTQ-Int4": "Qwen/Qwen2.5-VL-7B-Instruct",
    "unsloth/Qwen2.5-VL-3B-Instruct-unsloth-bnb-4bit": "Qwen/Qwen2.5-VL-3B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct-FP8": "Qwen/Qwen3-VL-4B-Instruct",
    "ggml-org/Qwen2.5-VL-7B-Instruct-GGUF": "Qwen/Qwen2.5-VL-7B-Instruct",
    "mlx-community/Qwen2.5-VL-3B-Instruct-8bit": "Qwen/Qwen2.5-VL-3B-Instruct",
    "org/thing-GGUF": "the original checkpoint",
}
OTHERS = ("org/my-awqward-model", "openai/whisper-base", "Qwen/Qwen3.5-4B", "Qwen/Qwen2.5-7B-Instruct")
KNOWN = ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct", "org/qwen2-vl-tuned", "org/my_qwen25vl")


def test_what_a_name_says_of_its_model():
    unread = "its name is that of quantized weights, which evoprune does not read; take {}; "
    assert {name: find.kind_hint(name) for name in ORIGINAL} == {k: unread.format(v) for k, v in ORIGINAL.items()}
    assert {find.kind_hint(name) for name in OTHERS} == {f"{find.MODEL_HINT}; "}
    assert {find.kind_hint(name) for name in KNOWN} == {""}


def test_quantised_names_are_known_before_the_download(hub, cache):
    _, hint = refused("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", offline=True)
    assert hint.startswith("its name is that of quantized weights")
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


HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"  # as transformers writes them


def change(folder, edited):
    """Writes the weights of a folder anew: `edited` changes their dict."""
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
    tree = describe_model(ModelOptions(str(folder))).tree
    assert sum(weight.numel() for weight in tree.parameters()) == sum(w.numel() for w in model.parameters())
    if apart:
        assert load_model(str(folder), load_format="dummy").model.config.tie_word_embeddings


def test_a_tensor_that_is_not_read_is_named_once(folder):
    def more(weights):
        weights["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 64)
        weights["value_head.bias"] = torch.zeros(1)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # buffers of older versions
        weights["visual.rotary_pos_emb.inv_freq"] = torch.zeros(8)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whole checkpoints say nothing
        load_model(str(folder))
    change(folder, more)
    with pytest.warns(ModelWarning) as said:
        load_model(str(folder))
    (only,) = said
    assert str(only.message).startswith(f"2 tensors of the weights are not used in {folder}: ")
    assert "q_proj.lora_A.weight, value_head.bias" in str(only.message)


def test_a_tensor_under_two_names_is_refused_where_they_differ(folder):
    old, new = "visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"
    change(folder, lambda weights: weights.update({new: weights[old].clone()}))
    assert_as_transformers(folder)
    change(folder, lambda weights: weights.update({new: weights[old] + 1}))
    assert f"{new} is stored twice" in error_of(folder)


def test_an_adapter_beside_the_weights_is_said(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 64)}, folder / "adapter_model.safetensors")
    with pytest.warns(
        ModelWarning, match=r"holds an adapter \(adapter_config.json\) beside the weights, which is not used"
    ):
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
    assert describe_model(ModelOptions(str(folder)))._stored == torch.float32
