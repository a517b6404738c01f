"""Compare models in GGUF files with the model folders from which the files were made."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evoprune import VideoQA
from evoprune.model import FAMILIES
from evoprune.session import ModelOptions, describe
from evoprune.session.gguf.blocks import DEQUANTIZE, dequantize
from evoprune.session.gguf.folder import gguf_facts
from evoprune.session.gguf.reader import KINDS
from evoprune.session.gguf.tensors import GgufTensors, gguf_tensors
from tests.gguf_files import Folder, add_to_ollama, weights_of, write_gguf
from tests.loading import load_model
from tests.quantized import parameters
from tests.tiny import add_mtp, save_tiny

CLIP = "samples/square.mp4"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
TEXTS = "How many réd squares, 1234?\n\n  it's  你好 ยิ้ม <|im_end|> <think>\t🚀", "It'S\r\n\r\n  3.5  --  "
OLLAMA = ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "qwen3_5_moe"]
PAIRS = ["qwen2_vl", *OLLAMA]
# Positions of the upper bytes of the scales in a block.
HALVES = {
    "Q4_0": (1,), "Q4_1": (1, 3), "Q5_0": (1,), "Q5_1": (1, 3), "Q8_0": (1,), "Q2_K": (81, 83), "Q3_K": (109,), "Q4_K": (1, 3),
    "Q5_K": (1, 3), "Q6_K": (209,), "IQ4_NL": (1,), "IQ4_XS": (1,), "MXFP4": (0,),
}  # fmt: skip
DIGESTS = {
    "Q4_0": "02c6d0592ba6b835",
    "Q4_1": "d75f8de22b9b5f76",
    "Q5_0": "6d6157caae4ecceb",
    "Q5_1": "72b152e48505bfd8",
    "Q8_0": "6e8fd1f836a5292d",
    "Q2_K": "882394bf5c8b2f2e",
    "Q3_K": "4a9f2867a37628a9",
    "Q4_K": "f5b723c8f368eae3",
    "Q5_K": "f698ce4228e10dd8",
    "Q6_K": "dff7fbbe45fee647",
    "IQ4_NL": "2e26d49db34a1815",
    "IQ4_XS": "66c88f975983f09d",
    "MXFP4": "1ff37053f2e409cc",
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Use separate folders for the cache and for Ollama's models."""
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """Return a function that saves a model of a family with random norms, which tests must not change."""
    saved = {}

    def save(family):
        if family not in saved:
            folder = save_tiny(tmp_path_factory.mktemp(family), family=family)
            random = torch.Generator().manual_seed(1)
            tensors = load_file(folder / "model.safetensors")
            for name, tensor in tensors.items():
                if name.endswith(("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight", "dt_bias")):
                    tensors[name] = tensor + torch.empty_like(tensor).uniform_(-0.3, 0.3, generator=random)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            template = folder / "chat_template.jinja"
            template.write_text(template.read_text() + "{# <|image_pad|> <|video_pad|> #}")
            # The settings that GGUF files hold, with the family's defaults for the others
            (folder / "video_preprocessor_config.json").unlink()
            traits = FAMILIES[family]
            pixels = {name: traits.picture[name] for name in ("min_pixels", "max_pixels")}
            processor = json.loads((folder / "preprocessor_config.json").read_text())
            (folder / "preprocessor_config.json").write_text(json.dumps(processor | pixels))
            ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
            saved[family] = folder
        return saved[family]

    return save


def answers(folder, **options):
    """Return an answer at two budgets."""
    loaded = load_model(str(folder), **{"dtype": "fp32"} | options)
    found = []
    for budget in (1.0, 0.25):
        answer = VideoQA(loaded, budget=budget).encode(CLIP, max_frames=8).ask("What happens?", max_new_tokens=6)
        found.append((answer.text, answer.ids))
    return found


def check_same(found, original):
    """Check that a model has the same settings, tokenizer, and tensors as its original."""
    mine, theirs = describe(ModelOptions(str(found))), describe(ModelOptions(str(original)))
    assert mine.config == theirs.config
    assert mine.limits == theirs.limits
    tensors, expected = gguf_tensors(mine.folder), joined(weights_of(original))
    assert set(tensors.keys()) == expected.keys()
    for name, tensor in expected.items():
        read = tensors.get_tensor(name)
        assert read.shape == tensor.shape, name
        assert torch.allclose(read.float(), tensor.float(), rtol=0, atol=2e-7), name


def joined(tensors):
    """Join the experts of a layer, as in the files of other families."""
    found = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", name):
            found.setdefault(match[1], {})[match[3], int(match[2])] = tensor
        else:
            found[name] = tensor
    for name in [name for name in found if name.endswith(".experts")]:
        experts = found.pop(name)
        gate, up, down = (
            torch.stack([experts[f"{each}_proj", number] for number in range(len(experts) // 3)])
            for each in ("gate", "up", "down")
        )
        found |= {f"{name}.gate_up_proj": torch.cat([gate, up], 1), f"{name}.down_proj": down}
    return found


@pytest.mark.parametrize("family", PAIRS)
def test_a_pair_is_its_original(original, family, tmp_path):
    folder = original(family)
    text = Folder(folder).write_pair(tmp_path / "models")
    check_same(text, folder)
    mine, theirs = load_model(str(text)), load_model(str(folder))
    assert mine.eos_ids == theirs.eos_ids
    assert mine.tokenizer.chat_template == theirs.tokenizer.chat_template
    assert mine.tokenizer.specials() == theirs.tokenizer.specials()
    assert mine.tokenizer.named.items() <= theirs.tokenizer.named.items()
    for sample in TEXTS:
        assert mine.tokenizer.encode(sample) == theirs.tokenizer.encode(sample)


@pytest.mark.few(3)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen2_vl", "qwen3_vl_moe", "qwen3_5_moe"])
def test_a_pair_answers_like_its_original(original, family, tmp_path):
    text = Folder(original(family)).write_pair(tmp_path / "models")
    assert answers(text) == answers(original(family))


@pytest.mark.parametrize("family", OLLAMA)
def test_a_single_file_of_ollama_is_its_original(original, family, tmp_path):
    more = {"mtp.fc.weight": torch.ones(2, 2), "mtp.layers.0.attn_norm.weight": torch.ones(3)}
    file = Folder(original(family)).write_single(tmp_path / "single", more=more)
    add_to_ollama(tmp_path / "ollama", "tiny", [file])
    check_same("ollama:tiny", original(family))


@pytest.mark.parametrize(("reordered", "fused"), [(False, False), (False, True), (True, True)])
def test_heads_of_a_delta_net_in_each_order(original, reordered, fused, tmp_path):
    """The fused matrix of both gates has the original order of heads."""
    folder = Folder(original("qwen3_5"))
    tensors = folder.single_tensors(reordered)
    if fused:
        plain = folder.single_tensors(reordered=False, fused=True)
        tensors = {name: each for name, each in tensors.items() if "ssm_alpha" not in name and "ssm_beta" not in name}
        tensors |= {name: each for name, each in plain.items() if "ssm_ba" in name}
    file = write_gguf(tmp_path / "single.gguf", folder.single_fields(reordered), tensors)
    check_same(file, folder.folder)


def test_a_pair_in_ollamas_store(original, tmp_path):
    text = Folder(original("qwen2_5_vl")).write_pair(tmp_path / "models")
    files = [text, *text.parent.glob("mmproj*")]
    add_to_ollama(tmp_path / "ollama", "tiny", files, tag="3b", owner="someone")
    add_to_ollama(tmp_path / "ollama", "Tiny-GGUF", files, tag="Q8_0", owner="someone", host="hf.co")
    check_same("ollama:someone/tiny:3b", original("qwen2_5_vl"))
    check_same("ollama:hf.co/someone/Tiny-GGUF:Q8_0", original("qwen2_5_vl"))


def test_a_split_file_is_read_as_one(original, tmp_path):
    first = Folder(original("qwen3_vl")).write_parts(tmp_path / "models")
    check_same(first, original("qwen3_vl"))
    check_same(first.with_name(first.name.replace("00001-of", "00003-of")), original("qwen3_vl"))
    check_same(first.parent, original("qwen3_vl"))


@pytest.fixture
def with_mtp(original, tmp_path):
    """Return a function that copies a model and adds a layer for multi-token prediction."""

    def copied(family):
        folder = shutil.copytree(original(family), tmp_path / "original")
        add_mtp(folder)
        return folder

    return copied


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_a_layer_for_multi_token_prediction(with_mtp, family, tmp_path):
    folder = with_mtp(family)
    text = Folder(folder).write_pair(tmp_path / "models")
    check_same(text, folder)
    theirs = load_model(str(folder), dtype="fp32").model.state_dict()
    mine = load_model(str(text), dtype="fp32").model.state_dict()
    own = [name for name in theirs if name.startswith("mtp.")]
    assert len(own) > 14 and mine.keys() == theirs.keys()
    assert all(torch.allclose(mine[name], theirs[name], rtol=0, atol=2e-7) for name in own)
    assert answers(text) == answers(folder)


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_a_quantized_layer_for_multi_token_prediction(with_mtp, kind, tmp_path):
    text = Folder(with_mtp("qwen3_5")).write_pair(tmp_path / "models", "Q8_0")
    loaded = load_model(str(text), dtype="fp32", quantize=kind)
    assert loaded.language.mtp_layer() is not None and not loaded.model.deferred
    assert not [name for name, weight in loaded.model.named_parameters() if weight.is_meta]


def test_several_layers_for_multi_token_prediction_are_left_out(original, tmp_path):
    folder = Folder(original("qwen3_5"))
    fields = folder.text_fields() | folder.tokenizer_fields() | {"qwen35.nextn_predict_layers": 2}
    depth = folder.text["num_hidden_layers"]
    fields["qwen35.block_count"] = depth + 2
    own = {name: each for name, each in folder.text_tensors().items() if name.startswith("blk.2.")}
    more = {name.replace("blk.2.", f"blk.{depth + i}."): each for name, each in own.items() for i in range(2)}
    more[f"blk.{depth}.nextn.embed_tokens.weight"] = torch.ones(4, 8)
    folder.write_pair(tmp_path)
    text = write_gguf(tmp_path / "tiny-F32.gguf", fields, folder.text_tensors() | more)
    assert answers(text) == answers(folder.folder)
    assert load_model(str(text)).language.mtp_layer() is None


def test_an_untied_output_layer(original, tmp_path):
    folder = shutil.copytree(original("qwen2_5_vl"), tmp_path / "untied")
    tensors = load_file(folder / "model.safetensors")
    embeddings = next(each for name, each in tensors.items() if "embed_tokens" in name)
    tensors["lm_head.weight"] = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(2))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    config.get("text_config", {}).pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    text = Folder(folder).write_pair(tmp_path / "models")
    check_same(text, folder)
    assert not describe(ModelOptions(str(text))).config.tie_word_embeddings


def test_a_padded_vocabulary_and_tokens_that_only_look_special(original, tmp_path):
    folder = Folder(original("qwen2_5_vl"))
    tokenizer = json.loads((folder.folder / "tokenizer.json").read_text())
    last = max(each["id"] for each in tokenizer["added_tokens"])
    fields = folder.text_fields() | folder.tokenizer_fields(padded=3)
    fields["tokenizer.ggml.tokens"][last + 1] = "<|fim_prefix|>"
    fields["tokenizer.ggml.tokens"][last + 2] = "<tool_call>"
    fields["tokenizer.ggml.token_type"][last + 1 : last + 3] = [3, 4]
    tensors = folder.text_tensors()
    tensors["token_embd.weight"] = torch.cat([tensors["token_embd.weight"], torch.zeros(3, 64)])
    tensors["output.weight"] = torch.cat([tensors["output.weight"], torch.zeros(3, 64)])
    folder.write_pair(tmp_path)
    loaded = load_model(str(write_gguf(tmp_path / "tiny-F32.gguf", fields, tensors)))
    assert loaded.model.config.text_config.vocab_size == last + 4
    assert "<|fim_prefix|>" not in loaded.tokenizer.specials()
    assert loaded.tokenizer.encode("<|fim_prefix|>") == [last + 1]
    assert loaded.tokenizer.encode("<tool_call>") == [last + 2]
    assert "[PAD" not in loaded.tokenizer.backend.to_str()


def test_the_swapped_matrices_of_old_files(original, tmp_path):
    folder = Folder(original("qwen2_vl"))
    text = folder.write_pair(tmp_path)
    swapped = {"up": "down", "down": "up"}
    tensors = {
        re.sub(r"ffn_(up|down)", lambda m: f"ffn_{swapped[m[1]]}", k): v for k, v in folder.projector_tensors().items()
    }
    fields = folder.projector_fields() | {"clip.vision.feed_forward_length": 0}
    write_gguf(tmp_path / "mmproj-tiny-f16.gguf", fields, tensors)
    check_same(text, folder.folder)


def test_sampling_settings(original, tmp_path):
    sampling = {"general.sampling.temp": 0.7, "general.sampling.top_k": 20, "general.sampling.top_p": 0.8}
    text = Folder(original("qwen2_5_vl")).write_pair(tmp_path, text=sampling)
    generation = load_model(str(text)).generation
    assert (generation.do_sample, generation.temperature, generation.top_k, generation.top_p) == (True, 0.7, 20, 0.8)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_a_template_for_text_only_is_replaced(original, family, tmp_path):
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    text = Folder(original(family)).write_pair(tmp_path, text={"tokenizer.chat_template": template})
    loaded = load_model(str(text))
    assert VideoQA(loaded).encode(CLIP, max_frames=2).ask("What happens?", max_new_tokens=1).text is not None
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    expected = "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
    if family == "qwen2_5_vl":
        expected = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{expected}"
    if family == "qwen3_5":
        expected += "<think>\n\n</think>\n\n"
    assert loaded.tokenizer.render(messages) == expected
    assert "chat template" in gguf_facts(loaded.description.folder)["assumed"]


@pytest.mark.few(2)
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_5", "qwen3_vl_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("quantize", parameters("int8", "int4"))
def test_quantized_layers_are_those_of_the_dequantized_weights(original, family, quantize, tmp_path, monkeypatch):
    text = Folder(original(family)).write_pair(tmp_path / "models", kind="Q8_0")
    tensors = gguf_tensors(describe(ModelOptions(str(text))).folder)
    folder = shutil.copytree(original(family), tmp_path / "dequantized")
    stored = {name: tensors.get_tensor(name).contiguous() for name in tensors.entries if name != EMBEDDINGS}
    save_file(stored | {EMBEDDINGS: tensors.compact(EMBEDDINGS)}, folder / "model.safetensors", {"format": "pt"})
    options = {"quantize": quantize, "store_quantized": True}
    expected = answers(folder, **options)
    assert answers(text, **options) == expected
    forbid_reading(monkeypatch)
    assert answers(text, **options) == expected


def forbid_reading(monkeypatch):
    """Let later starts read neither the weights in GGUF files nor quantize any layer."""
    monkeypatch.setattr("evoprune.session.loading.stored.calibrate", None)
    monkeypatch.setattr(GgufTensors, "blocks", lambda self, info: pytest.fail(f"{info.name} was read"))


def weights_in(loaded):
    """Return the parameters of a quantized model that are not quantized, and the biases of its quantized layers."""
    layers = loaded.model.named_modules()
    biases = {name: layer.bias for name, layer in layers if hasattr(layer, "packed") and layer.bias is not None}
    return dict(loaded.model.named_parameters()) | biases


def test_opening_files_does_not_import_the_compiler_of_torch(original, tmp_path):
    """It would take longer than everything else."""
    files = [Folder(original(family)).write_pair(tmp_path / family, kind="Q8_0") for family in PAIRS]
    files.append(Folder(original("qwen3_5")).write_single(tmp_path / "single.gguf"))
    folders = [str(describe(ModelOptions(str(file))).folder) for file in files]
    code = (
        "import sys; from pathlib import Path; from evoprune.session.gguf.tensors import gguf_tensors\n"
        "for folder in sys.argv[1:]: gguf_tensors(Path(folder))\n"
        "print('torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *folders]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


@pytest.mark.parametrize("quantize", parameters("int8"))
@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_later_starts_map_all_weights_from_the_stored_file(original, kind, dtype, quantize, tmp_path, monkeypatch):
    text = Folder(original("qwen3_5")).write_pair(tmp_path / "models", kind=kind)
    options = {"quantize": quantize, "store_quantized": True, "dtype": dtype}
    first = load_model(str(text), **options)
    with safe_open(first.quantized_file, "pt") as file:
        names = set(file.keys())
    others = {name for name, _ in first.model.named_parameters()}
    assert EMBEDDINGS in others and others < names
    forbid_reading(monkeypatch)
    expected, found = weights_in(first), weights_in(load_model(str(text), **options))
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == each.dtype and torch.equal(found[name], each) for name, each in expected.items())
    assert found[EMBEDDINGS].data_ptr() % 64 == 0  # products may depend on the alignment


@pytest.mark.parametrize("quantize", parameters("int8"))
@pytest.mark.parametrize("damage", ["cut", "a parameter less"])
def test_damaged_stored_weights_are_written_again(original, damage, quantize, tmp_path):
    text = Folder(original("qwen2_5_vl")).write_pair(tmp_path / "models", kind="Q8_0")
    options = {"quantize": quantize, "store_quantized": True}
    expected = answers(text, **options)
    (file,) = (tmp_path / "cache" / "weights").iterdir()
    whole = file.read_bytes()
    if damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    else:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys() if name != EMBEDDINGS}  # noqa: SIM118
            about = opened.metadata()
        save_file(tensors, file, about)
    assert answers(text, **options) == expected
    assert file.read_bytes() == whole


@pytest.mark.parametrize("quantize", parameters("int8"))
def test_weights_of_changed_files_are_stored_again(original, quantize, tmp_path):
    folder = Folder(original("qwen2_5_vl"))
    text = folder.write_pair(tmp_path / "models", kind="Q8_0")
    options = {"quantize": quantize, "store_quantized": True}
    first = load_model(str(text), **options)
    tensors = folder.projector_tensors()
    name = "v.post_ln.weight"
    tensors[name] = tensors[name] + 1
    write_gguf(next(text.parent.glob("mmproj*")), folder.projector_fields(), tensors)
    second = load_model(str(text), **options)
    assert second.quantized_file not in (None, first.quantized_file)
    norms = [loaded.model.model.visual.merger.ln_q.weight for loaded in (first, second)]
    assert torch.allclose(norms[0] + 1, norms[1], atol=0.02)


@pytest.mark.parametrize("kind", sorted(DEQUANTIZE))
def test_blocks_are_dequantized_like_in_llama_cpp(kind):
    """The digests are those of the results of `gguf.quants.dequantize` for the same blocks."""
    number = next(each for each in KINDS.values() if each.name == kind)
    values = dequantize(blocks_of(number), number) + 0.0  # without negative zeros
    assert hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16] == DIGESTS[kind]


def blocks_of(kind):
    """Return 64 random blocks with finite scales."""
    random = torch.Generator().manual_seed(kind.size)
    blocks = torch.randint(256, (64, kind.size), dtype=torch.uint8, generator=random)
    for high in HALVES[kind.name]:
        blocks[:, high] = blocks[:, high] & 0b10111111  # an exponent below 16
    return blocks.flatten()
