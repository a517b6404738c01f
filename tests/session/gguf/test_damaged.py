"""Read damaged, hostile, and unsupported GGUF files and Ollama stores."""

import json
import os
import struct
import time

import pytest
import torch

from evoprune.errors import ModelError
from evoprune.session import ModelOptions, describe
from evoprune.session.gguf import reader
from tests.gguf_files import Folder, add_to_ollama, string, write_gguf
from tests.loading import load_model
from tests.tiny import save_tiny

COUNT = 2**60


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
    start = time.monotonic()
    with pytest.raises(ModelError) as caught:
        load_model(str(name)) if load else describe(ModelOptions(str(name)))
    assert time.monotonic() - start < 20
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
    "an odd offset": (header(ARCH, info(offset=7), (1, 1)) + bytes(500), "invalid"),
    "half a block": (header(ARCH, info(shape=(33,), kind=8), (1, 1)) + bytes(500), "invalid"),
    "a tensor twice": (header(ARCH, info() * 2, (2, 1)) + bytes(500), "twice"),
    "overlapping tensors": (header(ARCH, info("a") + info("b", offset=32), (2, 1)) + bytes(500), "overlaps"),
    "an alignment of 0": (header(entry(4, bytes(4), "general.alignment")), "alignment"),
    "an alignment of text": (header(entry(8, string("x"), "general.alignment")), "alignment"),
    "an alignment that is no power of 2": (header(entry(4, struct.pack("<I", 33), "general.alignment")), "alignment"),
    "a type that is not supported": (header(ARCH, info(shape=(256,), kind=17), (1, 1)) + bytes(500), "IQ2_XS"),
    "a type that does not exist": (header(ARCH, info(kind=999), (1, 1)) + bytes(500), "type 999"),
    "text that is not Unicode": (header(entry(8, string(b"\xff\xfe"))), "architecture"),
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


FIELDS = {
    "another architecture": ({"general.architecture": "llama"}, "llama"),
    "an old architecture": ({"general.architecture": "qwen2"}, "qwen2"),
    "yarn": ({"qwen2vl.rope.scaling.type": "yarn", "qwen2vl.rope.scaling.factor": 4.0}, "yarn"),
    "other words": ({"tokenizer.ggml.pre": "llama-bpe"}, "llama-bpe"),
    "another tokenizer": ({"tokenizer.ggml.model": "llama"}, "llama"),
    "too few token types": ({"tokenizer.ggml.token_type": [1]}, "token types"),
    "token types of text": ({"tokenizer.ggml.token_type": ["1"]}, "token_type"),
    "merges that are not pairs": ({"tokenizer.ggml.merges": ["a b c"]}, "pair"),
    "merges of unknown tokens": ({"tokenizer.ggml.merges": ["\u1234 \u1235"]}, ""),
    "more layers than tensors": ({"qwen2vl.block_count": 900}, "blk.|layers|lack"),
    "no layers": ({"qwen2vl.block_count": 0}, "block_count"),
    "layers only for prediction": ({"qwen2vl.nextn_predict_layers": 2}, "layers"),
    "negative heads": ({"qwen2vl.attention.head_count": -1.0}, "head_count"),
    "too many heads": ({"qwen2vl.attention.head_count": 7}, "heads"),
    "another width": ({"qwen2vl.embedding_length": 128}, "128|sizes"),
    "a context of text": ({"qwen2vl.context_length": "long"}, "context_length"),
    "other sections": ({"qwen2vl.rope.dimension_sections": [1, 2, 3, 0]}, "mrope_section"),
    "a template that is a number": ({"tokenizer.chat_template": 7}, "chat_template"),
    "a split file": ({"split.count": 3, "split.no": 0, "split.tensors.count": 9}, "1 files"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIELDS)
def test_unsupported_metadata(tiny, case, tmp_path):
    fields, words = FIELDS[case]
    message = refused(tiny.write_pair(tmp_path, text=fields), load=True)
    assert any(each in message for each in words.split("|")), message


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


MANIFESTS = {
    "empty": "",
    "not JSON": "{",
    "nested": "[" * 10_000,
    "a list": "[]",
    "no layers": "{}",
    "layers of text": json.dumps({"layers": ["a"]}),
    "many layers": json.dumps({"layers": [{}] * 101}),
    "an index": json.dumps({"manifests": [{"digest": "sha256:" + "0" * 64}]}),
    "a path": json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../secret"}]}),
    "a short digest": json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:00"}]}),
    "a digest that is a number": json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": 7}]}),
    "a missing file": json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:" + "0" * 64}]}),
    "no model": json.dumps({"layers": [{"mediaType": "application/vnd.ollama.image.license", "digest": "sha256:" + "0" * 64}]}),
}  # fmt: skip


@pytest.mark.parametrize("case", MANIFESTS)
def test_damaged_manifests(case, tmp_path):
    manifest = tmp_path / "ollama/manifests/registry.ollama.ai/library/tiny/latest"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(MANIFESTS[case])
    refused("ollama:tiny")


def test_manifests_and_files_that_lead_in_circles(tiny, tmp_path):
    text = tiny.write_pair(tmp_path / "models")
    manifest = add_to_ollama(tmp_path / "ollama", "tiny", [text, *text.parent.glob("mmproj*")])
    blob = next((tmp_path / "ollama/blobs").iterdir())
    blob.unlink()
    blob.symlink_to(blob)
    refused("ollama:tiny")
    manifest.unlink()
    manifest.symlink_to(manifest)
    refused("ollama:tiny")


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
