"""Read damaged, hostile, and unsupported GGUF files and Ollama stores."""

import json
import os
import shutil
import struct
import time
import tracemalloc

import pytest
import torch

from evoprune import VideoQA
from evoprune.errors import ModelError
from evoprune.session import ModelOptions, describe
from evoprune.session.gguf import reader
from tests.gguf_files import Folder, add_to_ollama, string, write_gguf
from tests.loading import load_model
from tests.tiny import save_tiny

COUNT = 2**60
MODEL, PROJECTOR = "application/vnd.ollama.image.model", "application/vnd.ollama.image.projector"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The contents of a tiny Qwen2.5-VL model."""
    return Folder(save_tiny(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def tiny3(tmp_path_factory):
    """The contents of a tiny Qwen3-VL model."""
    return Folder(save_tiny(tmp_path_factory.mktemp("tiny3"), family="qwen3_vl"))


def refused(name, load=False):
    """Return the message and the hint of the error for a model, which must come quickly and without much memory."""
    start = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            load_model(str(name)) if load else describe(ModelOptions(str(name)))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert time.process_time() - start < 5
    assert most < 100e6
    problem = caught.value
    assert problem.hint and "\n" not in problem.message + problem.hint
    assert len(problem.message) < 1500
    return f"{problem.message}; {problem.hint}"


def header(entries=b"", tensors=b"", counts=None, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, *(counts or (0, 1))) + entries + tensors


def entry(kind, data, key="general.architecture"):
    return string(key) + struct.pack("<I", kind) + data


def info(name="a", shape=(32,), kind=0, offset=0, dims=None):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape) if dims is None else dims, *shape, kind, offset)


ARCH = entry(8, string("qwen2vl"))
NESTED = struct.pack("<IQ", 9, 1) * 3 + struct.pack("<IQ", 4, 0)
# The contents of damaged files, and a part of the error message.
HEADERS = {
    "an empty file": (b"", "not a GGUF file"),
    "text": (b"version https://git-lfs.github.com/spec/v1", "not a GGUF file"),
    "only the magic number": (b"GGUF", "ends in its header"),
    "another format": (b"GGML" + bytes(100), "not a GGUF file"),
    "version 1": (header(version=1), "version is 1"),
    "version 99": (header(version=99), "version is 99"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many entries": (header(counts=(0, COUNT)), "too many"),
    "many tensors": (header(counts=(COUNT, 0)), "too many"),
    "fewer entries than stated": (header(ARCH, counts=(0, 5000)), "ends in its header"),
    "fewer tensors than stated": (header(ARCH, counts=(5000, 1)), "ends in its header"),
    "a long key": (header(struct.pack("<Q", COUNT) + b"a"), "bytes"),
    "a long string": (header(entry(8, struct.pack("<Q", COUNT))), "bytes"),
    "a cut-off string": (header(entry(8, struct.pack("<Q", 50) + b"qwen")), "bytes"),
    "a long list": (header(entry(9, struct.pack("<IQ", 4, COUNT))), "too long"),
    "a long list of strings": (header(entry(9, struct.pack("<IQ", 8, 2**21))), "ends in its header"),
    "a list of a long string": (header(entry(9, struct.pack("<IQQ", 8, 1, COUNT))), "bytes"),
    "a cut-off list": (header(entry(9, struct.pack("<IQ", 4, 1000))), "ends in its header"),
    "many lists": (header(b"".join(entry(9, struct.pack("<IQ", 9, 2**22 + 1), f"k{i}") for i in range(9)), counts=(0, 9)), "long"),
    "nested lists": (header(entry(9, NESTED)), "nested"),
    "an unknown type": (header(entry(77, b"")), "unknown type 77"),
    "an entry twice": (header(ARCH * 2, counts=(0, 2)), "twice"),
    "no dimensions": (header(ARCH, info(shape=()), (1, 1)), "0 dimensions"),
    "many dimensions": (header(ARCH, info(dims=2**32 - 1), (1, 1)), "dimensions"),
    "a huge dimension": (header(ARCH, info(shape=(COUNT, COUNT)), (1, 1)), "cut off"),
    "an empty dimension": (header(ARCH, info(shape=(0,)), (1, 1)), "invalid"),
    "a tensor behind the end": (header(ARCH, info(offset=2**40), (1, 1)), "cut off"),
    "a negative offset": (header(ARCH, info(offset=2**64 - 32), (1, 1)) + bytes(500), "cut off"),
    "an offset that overflows": (header(ARCH, info(offset=2**63 - 32), (1, 1)) + bytes(500), "cut off"),
    "a size that overflows": (header(ARCH, info(shape=(2**32, 2**32)), (1, 1)) + bytes(500), "cut off"),
    "an odd offset": (header(ARCH, info(offset=7), (1, 1)) + bytes(500), "invalid"),
    "half a block": (header(ARCH, info(shape=(33,), kind=8), (1, 1)) + bytes(500), "invalid"),
    "a tensor twice": (header(ARCH, info() * 2, (2, 1)) + bytes(500), "twice"),
    "overlapping tensors": (header(ARCH, info("a") + info("b", offset=32), (2, 1)) + bytes(500), "overlaps"),
    "an alignment of 0": (header(entry(4, bytes(4), "general.alignment")), "alignment"),
    "a negative alignment": (header(entry(5, b"\xe0\xff\xff\xff", "general.alignment")), "alignment"),
    "a huge alignment": (header(entry(4, struct.pack("<I", 2**31), "general.alignment")), "alignment"),
    "an alignment of text": (header(entry(8, string("x"), "general.alignment")), "alignment"),
    "an alignment that is no power of 2": (header(entry(4, struct.pack("<I", 33), "general.alignment")), "alignment"),
    "a type that is not supported": (header(ARCH, info(shape=(256,), kind=17), (1, 1)) + bytes(500), "IQ2_XS"),
    "a type that does not exist": (header(ARCH, info(kind=999), (1, 1)) + bytes(500), "type 999"),
    "text that is not Unicode": (header(entry(8, string(b"\xff\xfe"))), "architecture"),
    "an architecture that is a list": (header(entry(9, struct.pack("<IQ", 8, 1) + string("qwen2vl"))), "general.architecture"),
    "no architecture": (header(entry(4, bytes(4), "a")), "general.architecture"),
    "an architecture that is a number": (header(entry(4, bytes(4))), "general.architecture"),
}  # fmt: skip


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_headers(case, tmp_path):
    content, words = HEADERS[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    assert words in refused(path)


def test_a_file_that_is_cut_off_anywhere(tiny, tmp_path):
    text = tiny.write_pair(tmp_path)
    content = text.read_bytes()
    ends = [*range(0, 64, 7), *range(64, len(content), len(content) // 25), len(content) - 1]
    for end in ends:
        text.write_bytes(content[:end])
        refused(text)


def test_a_file_with_changed_bytes_is_refused_or_read(tiny, tmp_path):
    text = tiny.write_pair(tmp_path)
    content = text.read_bytes()
    random = torch.Generator().manual_seed(0)
    for place in torch.randint(4, 12_000, (60,), generator=random).tolist():
        text.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            load_model(str(text))
        except ModelError as problem:
            assert problem.hint


def test_a_long_header(tmp_path):
    """The file consists of holes, except for the lengths of 1 MiB texts."""
    path = tmp_path / "model.gguf"
    path.write_bytes(header(entry(9, struct.pack("<IQ", 8, 2000))))
    with path.open("r+b") as file:
        for number in range(2000):
            file.seek(path.stat().st_size if number == 0 else 2**20, os.SEEK_SET if number == 0 else os.SEEK_CUR)
            file.write(struct.pack("<Q", 2**20))
        file.truncate(file.tell() + 2**20)
    assert "header" in refused(path)


FIELDS = {
    "another architecture": ({"general.architecture": "llama"}, "llama"),
    "an old architecture": ({"general.architecture": "qwen2"}, "qwen2"),
    "yarn": ({"qwen2vl.rope.scaling.type": "yarn", "qwen2vl.rope.scaling.factor": 4.0}, "yarn"),
    "other words": ({"tokenizer.ggml.pre": "llama-bpe"}, "llama-bpe"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, "llama"),
    "too few token types": ({"tokenizer.ggml.token_type": [1]}, "token types"),
    "token types of text": ({"tokenizer.ggml.token_type": ["1"]}, "token_type"),
    "merges that are not pairs": ({"tokenizer.ggml.merges": ["a b c"]}, "pair"),
    "merges of unknown tokens": ({"tokenizer.ggml.merges": ["\u1234 \u1235"]}, "merge"),
    "no merges": ({"tokenizer.ggml.merges": None}, "merges"),
    "no tokens": ({"tokenizer.ggml.tokens": [], "tokenizer.ggml.token_type": []}, "vocabulary"),
    "nested tokens": ({"tokenizer.ggml.tokens": [["a"]]}, "tokens"),
    "an empty token": ({"tokenizer.ggml.tokens": lambda tokens: ["", *tokens[1:]]}, "vocabulary"),
    "few tokens": ({f"tokenizer.ggml.{name}": lambda each: each[-30:] for name in ("tokens", "token_type")}, "merge"),
    "no token for images": (
        {"tokenizer.ggml.tokens": lambda tokens: [token.replace("image_pad", "image") for token in tokens]},
        "<|image_pad|>",
    ),
    "only control tokens": ({"tokenizer.ggml.token_type": lambda kinds: [3] * len(kinds)}, "merge"),
    "token types that do not exist": ({"tokenizer.ggml.token_type": lambda kinds: [77] * len(kinds)}, "merge"),
    "an end outside of the vocabulary": ({"tokenizer.ggml.eos_token_id": 100_000}, "100,000"),
    "a temperature that is not a number": ({"general.sampling.temp": float("nan")}, "general.sampling.temp"),
    "a fraction of tokens": ({"general.sampling.top_k": 1.5}, "general.sampling.top_k"),
    "a probability above 1": ({"general.sampling.top_p": 7.0}, "general.sampling.top_p"),
    "more layers than tensors": ({"qwen2vl.block_count": 900}, "blk.|layers|lack"),
    "no layers": ({"qwen2vl.block_count": 0}, "block_count"),
    "layers only for prediction": ({"qwen2vl.nextn_predict_layers": 2}, "layers"),
    "many layers": ({"qwen2vl.block_count": 2**31}, "block_count"),
    "an epsilon that is not a number": ({"qwen2vl.attention.layer_norm_rms_epsilon": float("nan")}, "epsilon"),
    "an infinite epsilon": ({"qwen2vl.attention.layer_norm_rms_epsilon": float("inf")}, "epsilon"),
    "a rotary base of 0": ({"qwen2vl.rope.freq_base": 0.0}, "rope_theta"),
    "no rotary base": ({"qwen2vl.rope.freq_base": None}, "freq_base"),
    "no heads": ({"qwen2vl.attention.head_count": 0}, "head_count"),
    "more key heads than heads": ({"qwen2vl.attention.head_count_kv": 16}, "heads"),
    "an empty context": ({"qwen2vl.context_length": 0}, "context_length"),
    "no sections": ({"qwen2vl.rope.dimension_sections": []}, "mrope_section"),
    "huge sections": ({"qwen2vl.rope.dimension_sections": [2**24] * 4}, "mrope_section"),
    "negative heads": ({"qwen2vl.attention.head_count": -1.0}, "head_count"),
    "too many heads": ({"qwen2vl.attention.head_count": 7}, "heads"),
    "another width": ({"qwen2vl.embedding_length": 128}, "128|sizes"),
    "a context of text": ({"qwen2vl.context_length": "long"}, "context_length"),
    "other sections": ({"qwen2vl.rope.dimension_sections": [1, 2, 3, 0]}, "mrope_section"),
    "a template that is a number": ({"tokenizer.chat_template": 7}, "chat_template"),
    "a list of files": ({"split.count": list(range(999))}, "1 files"),
    "a split file": ({"split.count": 3, "split.no": 0, "split.tensors.count": 9}, "1 files"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_unsupported_metadata(tiny, case, tmp_path):
    changes, words = FIELDS[case]
    usual = tiny.text_fields() | tiny.tokenizer_fields()
    fields = {name: each(usual[name]) if callable(each) else each for name, each in changes.items()}
    message = refused(tiny.write_pair(tmp_path, text=fields), load=True)
    assert str(tmp_path / "cache") not in message  # which has files that the user does not know
    assert any(each in message for each in words.split("|")), message


def test_a_broken_template_names_the_file(tiny, tmp_path):
    """The error occurs only when a question is asked."""
    text = tiny.write_pair(tmp_path, text={"tokenizer.chat_template": "{{ 1 / 0 }} <|image_pad|> <|video_pad|>"})
    qa = VideoQA(load_model(str(text)))
    with pytest.raises(ModelError, match="chat template cannot be used") as caught:
        qa.ask("samples/square.mp4", "What?", max_new_tokens=1).text  # noqa: B018
    assert str(text) in caught.value.message
    assert str(tmp_path / "cache") not in caught.value.message


def test_a_projector_of_another_model(tiny, tiny3, tmp_path):
    text = tiny.write_pair(tmp_path)
    write_gguf(tmp_path / "mmproj-tiny-f16.gguf", tiny3.projector_fields(), tiny3.projector_tensors())
    assert "belongs to another model" in refused(text)
    wide = tiny.projector_tensors()
    wide["mm.2.weight"] = torch.ones(96, 256)
    write_gguf(tmp_path / "mmproj-tiny-f16.gguf", tiny.projector_fields(), wide)
    assert "96" in refused(text)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_sinks.weight", "rope_freqs.weight", "v.blk.0.attn_sinks.weight", "v.class_embd"]
)
def test_an_unknown_tensor(tiny, name, tmp_path):
    text = tiny.write_pair(tmp_path)
    fields = tiny.text_fields() | tiny.tokenizer_fields()
    write_gguf(text, fields, tiny.text_tensors() | {name: torch.ones(32)})
    if name.startswith("v."):
        text = tiny.write_single(tmp_path / "one.gguf", more={name: torch.ones(32)})
    assert name in refused(text, load=True)


@pytest.mark.parametrize("change", ["missing", "shape", "dimensions"])
def test_tensors_that_do_not_fit(tiny, change, tmp_path):
    text = tiny.write_pair(tmp_path)
    tower = tiny.projector_tensors()
    if change == "missing":
        del tower["v.blk.1.attn_k.weight"]
    else:
        tower["v.blk.1.attn_k.weight"] = torch.ones(7, 9) if change == "shape" else torch.ones(4)
    write_gguf(tmp_path / "mmproj-tiny-f16.gguf", tiny.projector_fields(), tower)
    refused(text, load=True)


def test_folders_with_no_pair_or_several(tiny, tmp_path):
    text = tiny.write_pair(tmp_path / "one")
    assert "is a projector" in refused(text.parent / "mmproj-tiny-f16.gguf")
    assert str(text) in refused(text.parent / "mmproj-tiny-f16.gguf")
    (text.parent / "mmproj-tiny-f16.gguf").unlink()
    assert "no projector next to it" in refused(text)
    text.rename(text.with_name("mmproj-model.gguf"))
    assert "only projectors" in refused(text.parent)
    for name in ("a", "b"):
        tiny.write_pair(tmp_path / "two", name=name)
    assert "several models" in refused(tmp_path / "two")
    assert describe(ModelOptions(str(tmp_path / "two" / "b-F32.gguf"))).config
    (tmp_path / "two" / "a-F32.gguf").rename(tmp_path / "two" / "c.gguf")
    assert "several projectors" in refused(tmp_path / "two" / "c.gguf")


def test_parts_that_are_missing_or_mixed_up(tiny, tmp_path):
    first = tiny.write_parts(tmp_path)
    second, third = (first.with_name(first.name.replace("00001-of", f"0000{n}-of")) for n in (2, 3))
    content = second.read_bytes()
    second.unlink()
    assert second.name in refused(first)
    second.write_bytes(third.read_bytes())
    refused(first)
    third.write_bytes(content)
    assert "order" in refused(first)


def layers(*found):
    return json.dumps({"layers": [{"mediaType": kind, "digest": digest} for kind, digest in found]})


ZERO = f"sha256:{'0' * 64}"
MANIFESTS = {
    "empty": "",
    "not JSON": "{",
    "not text": b"\xff\xfe{}",
    "nested": "[" * 10_000,
    "a list": "[]",
    "no layers": "{}",
    "layers of text": json.dumps({"layers": ["a"]}),
    "many layers": json.dumps({"layers": [{}] * 101}),
    "an index": json.dumps({"manifests": [{"digest": ZERO}]}),
    "layers twice": '{"layers": [], "layers": 3}',
    "a path": layers((MODEL, "sha256:../../secret")),
    "a path in a long digest": layers((MODEL, f"sha256-../../{'0' * 58}")),
    "an absolute path": layers((MODEL, "/etc/passwd")),
    "a short digest": layers((MODEL, "sha256:00")),
    "a digest in capitals": layers((MODEL, f"sha256:{'A' * 64}")),
    "a digest with a line break": layers((MODEL, f"{ZERO}\n")),
    "a digest that is a number": layers((MODEL, 7)),
    "a type that is a list": layers(([], ZERO)),
    "a missing file": layers((MODEL, ZERO)),
    "no model": layers(("application/vnd.ollama.image.license", ZERO)),
    "only a projector": layers((PROJECTOR, ZERO)),
    "several projectors": layers((MODEL, ZERO), (PROJECTOR, ZERO), (PROJECTOR, ZERO)),
    "tensors of another format": layers(("application/vnd.ollama.image.tensor", ZERO)),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_damaged_manifests(case, tmp_path):
    manifest = tmp_path / "ollama/manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    content = MANIFESTS[case]
    manifest.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert "ollama:tiny" in refused("ollama:tiny")


def test_a_huge_manifest(tmp_path):
    manifest = tmp_path / "ollama/manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    with manifest.open("wb") as file:
        file.truncate(2**32)
    assert "larger" in refused("ollama:tiny")


def swap(store, manifest):
    """Exchange the types of the layers."""
    content = json.loads(manifest.read_text())
    first, second, *_ = content["layers"]
    first["mediaType"], second["mediaType"] = PROJECTOR, MODEL
    manifest.write_text(json.dumps(content))


def replace_blobs(make):
    def change(store, manifest):
        for blob in list((store / "blobs").iterdir()):
            blob.unlink()
            make(blob, manifest)

    return change


def replace(name, make):
    """Replace a part of a store. The part is named after the store, blobs, or the manifest."""

    def change(store, manifest):
        path = {"store": store, "blobs": store / "blobs", "manifest": manifest}[name]
        path.unlink() if path.is_file() else shutil.rmtree(path)
        make(path)

    return change


def link_to_itself(path, *_):
    path.symlink_to(path)


STORES = {
    "layers of exchanged types": swap,
    "files that lead to themselves": replace_blobs(link_to_itself),
    "files that are folders": replace_blobs(lambda blob, _: blob.mkdir()),
    "files that are the manifest": replace_blobs(lambda blob, manifest: blob.symlink_to(manifest)),
    "files that are empty": replace_blobs(lambda blob, _: blob.touch()),
    "files that are pipes": replace_blobs(lambda blob, _: os.mkfifo(blob)),
    "no files": replace("blobs", lambda path: None),
    "files in a file": replace("blobs", lambda path: path.touch()),
    "files in a folder that leads to itself": replace("blobs", link_to_itself),
    "a manifest that leads to itself": replace("manifest", link_to_itself),
    "a manifest that leads nowhere": replace("manifest", lambda path: path.symlink_to("nowhere")),
    "a manifest that is a folder": replace("manifest", lambda path: path.mkdir()),
    "a manifest that is a pipe": replace("manifest", os.mkfifo),
    "a store that is a file": replace("store", lambda path: path.touch()),
    "a store that leads to itself": replace("store", link_to_itself),
}


@pytest.mark.parametrize("case", STORES)
def test_damaged_stores(tiny, case, tmp_path):
    text = tiny.write_pair(tmp_path / "models")
    manifest = add_to_ollama(tmp_path / "ollama", "tiny", [text, *text.parent.glob("mmproj*")])
    STORES[case](tmp_path / "ollama", manifest)
    refused("ollama:tiny")


@pytest.mark.parametrize("part", ["text", "projector"])
@pytest.mark.parametrize(
    "make", [link_to_itself, lambda path: path.symlink_to("nowhere"), os.mkfifo, lambda path: path.touch()]
)
def test_files_of_a_pair_that_cannot_be_read(tiny, part, make, tmp_path):
    text = tiny.write_pair(tmp_path)
    damaged = text if part == "text" else next(tmp_path.glob("mmproj*"))
    damaged.unlink()
    make(damaged)
    for name in (text, tmp_path):
        message = refused(name)
        assert damaged.name in message
        assert "damaged" in message or "cannot be read" in message


def test_a_projector_that_is_the_text_file(tiny, tmp_path):
    text = tiny.write_pair(tmp_path)
    next(tmp_path.glob("mmproj*")).write_bytes(text.read_bytes())
    assert "fits" in refused(text)


@pytest.mark.parametrize(("part", "quantize"), [("scale", "int8"), ("weight", "none")])
def test_weights_that_are_not_numbers(tiny, part, quantize, tmp_path):
    text = tiny.write_pair(tmp_path, kind="Q8_0" if part == "scale" else "F32")
    found = reader.read_header(text).tensors["blk.0.ffn_up.weight"]
    content = bytearray(text.read_bytes())
    content[found.offset : found.offset + 4] = b"\xff\x7f\xff\x7f"  # NaN in float16, and in float32
    text.write_bytes(content)
    inputs = VideoQA(load_model(str(text), quantize=quantize)).encode("samples/square.mp4", max_frames=2)
    with pytest.raises(ModelError) as caught:
        inputs.ask("What?", max_new_tokens=1).text  # noqa: B018
    assert "NaN" in caught.value.message and caught.value.hint


def test_an_ollama_model_with_an_adapter(tiny, tmp_path):
    text = tiny.write_pair(tmp_path / "models")
    manifest = add_to_ollama(tmp_path / "ollama", "tiny", [text, *text.parent.glob("mmproj*")])
    content = json.loads(manifest.read_text())
    content["layers"].append({"mediaType": "application/vnd.ollama.image.adapter", "digest": f"sha256:{'0' * 64}"})
    manifest.write_text(json.dumps(content))
    assert "adapter" in refused("ollama:tiny")


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "a/b/c/d", "a:b:c/..", "..", "a/../b", "tiny:../x", "x" * 10_000]
)
def test_names_that_are_not_ollamas(name):
    assert "not the name" in refused(f"ollama:{name}")


def test_a_missing_ollama_model_and_the_others(tiny, tmp_path):
    assert "ollama pull tiny" in refused("ollama:tiny")
    text = tiny.write_pair(tmp_path / "models")
    add_to_ollama(tmp_path / "ollama", "tiny", [text], tag="3b")
    assert "ollama:tiny:3b" in refused("ollama:tiny")


def test_a_pipe_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "model.gguf")
    refused(tmp_path / "model.gguf")


def test_lists_have_a_limit_together(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_VALUES", 100)
    fields = {f"list{number}": list(range(20)) for number in range(6)}
    assert "too long" in refused(write_gguf(tmp_path / "model.gguf", fields, {}))
