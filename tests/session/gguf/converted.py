"""Compare evoprune with llama.cpp on GGUF files that llama.cpp's own converter and quantization wrote.

    python -m experiments.environments gguf        # installs llama.cpp, and runs this command
    python -m tests.session.gguf.converted --sources SOURCES [-o PAGE] [--families qwen3_vl,qwen3_5] [--kinds Q8_0,Q4_K_M]

SOURCES is the folder of llama.cpp with convert_hf_to_gguf.py. For each family, the command writes a small model with random
weights, converts it to a text file and a projector, quantizes the text file to each type, and compares tensors, settings, tokens,
and logits. Each family runs in a process of its own, because llama.cpp ends its process if it cannot run a model. With `-o`, the
command writes its tables into a page, between two comments.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
from contextlib import closing
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from experiments.gguf.convert import convert
from experiments.gguf.models import EXPERTS, LAYERS, words_of, write_model
from experiments.speed.processes import ROOT
from experiments.tables import fill, table

KINDS = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS",
    "Q3_K_M", "Q2_K", "MXFP4_MOE",
)  # fmt: skip
PROJECTORS = "F32", "F16", "BF16", "Q8_0"  # types that the converter writes
TEXTS = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHow many red squares are there?<|im_end|>\n",
    "The green circle stays in the middle; the blue one moves to the left. 你好, Größe 1234! \n\n\t<think>It'S 3.5?</think>",
)
WORDS = "réd 你好 ยิ้ม 🚀 <|im_end|> <think> </think> <|fim_prefix|> It'S I'll 1234 3.5 \r\n\r\n \n\t -- _a, (b) naïve \u00a0 x\u200b"
QUESTION = "What is in this picture?"
SIDE = 448  # height and width of the picture, a multiple of the sizes of units in all families


BEGIN, END = "<!-- comparison -->", "<!-- end of the comparison -->"


@dataclass
class Kind:
    """The comparison of one file."""

    types: str = ""  # types of the blocks, most frequent first
    tensors: int = 0
    same: int = 0  # tensors whose dequantized values are the same as in the package gguf
    error: float = 0.0  # root mean square error of the weights, relative to the original
    text: float = 0.0  # root mean square difference of logits from llama.cpp, relative to their standard deviation
    text_best: str = ""
    exact: float = 0.0  # same, from llama.cpp with the dequantized weights in float32
    picture: float | None = None  # same for the logits after a picture
    picture_exact: float | None = None


@dataclass
class Family:
    """The comparison of the files of one family."""

    tensors: int = 0
    difference: float = 0.0  # largest difference of a tensor from the original, in the F32 files
    differ: list[str] = field(default_factory=list)  # settings that differ from the original
    texts: int = 0
    logits: float = 0.0  # largest difference of a logit from llama.cpp in the F32 files
    logits_range: float = 0.0
    picture: float = 0.0
    kinds: dict[str, Kind] = field(default_factory=dict)


def compare(family: str, sources: Path, kinds: list[str], folder: Path) -> Family:
    """Write and compare all files of a family."""
    from experiments.gguf import llama

    original = folder / "original"
    write_model(original, family)
    more = ["--no-mtp"] if "qwen3_5" in family else []
    full = folder / "F32" / "small-F32.gguf"
    for kind in ("F32", *PROJECTORS):
        (folder / kind).mkdir(exist_ok=True)
    convert(sources, original, full, words_of(family), "--outtype", "f32", *more)
    for kind in PROJECTORS:
        out = folder / kind / f"mmproj-small-{kind}.gguf"
        convert(sources, original, out, words_of(family), "--outtype", kind.lower(), "--mmproj")
    found = Family()
    _compare_settings(found, full, original)
    for kind in kinds:
        if kind == "MXFP4_MOE" and not family.endswith("moe"):
            continue
        text = folder / kind / f"small-{kind}.gguf"
        text.parent.mkdir(exist_ok=True)
        if not list(text.parent.glob("mmproj-*")):
            projector = text.parent / "mmproj-small-F32.gguf"
            projector.hardlink_to(full.parent / projector.name)
        if text != full:
            llama.quantize(full, text, kind)
        found.kinds[kind] = _compare_kind(found, text, original, sources)
    return found


def _compare_settings(found: Family, text: Path, original: Path) -> None:
    """Compare the settings, the tokenizer, and the tensors of an F32 file with the original folder."""
    from tokenizers import Tokenizer

    from evoprune.session import ModelOptions, describe, load_model
    from experiments.gguf.llama import Model

    mine, theirs = describe(ModelOptions(str(text))), describe(ModelOptions(str(original)))
    loaded, expected = load_model(mine), load_model(theirs)
    model = Model(text)
    # llama.cpp does not normalize texts.
    samples = [unicodedata.normalize("NFC", each) for each in (*TEXTS, WORDS, *WORDS.split(" "), *_random_texts(300))]
    found.texts = len(samples)
    files = (Tokenizer.from_file(str(each.folder / "tokenizer.json")) for each in (mine, theirs))
    ours, originals = ([each.encode(text).ids for text in samples] for each in files)
    llamas = [model.encode(text) for text in samples]
    same = {
        "config": mine.config == theirs.config,
        "limits": mine.limits == theirs.limits,
        "end tokens": loaded.eos_ids == expected.eos_ids,
        "special tokens": loaded.tokenizer.specials() == expected.tokenizer.specials(),
        "template": loaded.tokenizer.chat_template == expected.tokenizer.chat_template,
        "tokens": ours == originals,
        "llama.cpp's tokens": ours == llamas,
    }
    found.differ = [name for name, equal in same.items() if not equal]
    for name, each in _originals(original).items():
        read = _tensors(text).get_tensor(name)
        found.tensors += 1
        found.difference = max(found.difference, float((read.float() - each).abs().max()))


def _random_texts(count: int) -> list[str]:
    """Return texts with random characters, most of them letters of several scripts."""
    random = np.random.default_rng(0)
    ranges = (32, 127), (160, 600), (900, 1200), (3584, 3675), (0x4E00, 0x4F00), (0x1F300, 0x1F600), (9, 14)
    texts = []
    for _ in range(count):
        places = random.choice(len(ranges), random.integers(1, 40), p=[0.6, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05])
        texts.append("".join(chr(random.integers(*ranges[place])) for place in places))
    return texts


def _tensors(text: Path):
    from evoprune.session import ModelOptions, describe
    from evoprune.session.gguf.tensors import gguf_tensors

    return gguf_tensors(describe(ModelOptions(str(text))).folder)


def _originals(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of the original folder under the names of current checkpoints, in float32."""
    from safetensors.torch import load_file

    found = {}
    for file in folder.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            name = re.sub(
                r"^(?=visual\.)", "model.", re.sub(r"^model\.(?!visual|language_model)", "model.language_model.", name)
            )
            found[name] = tensor.float()
    experts = [match for name in found if (match := re.fullmatch(r"(.+\.experts)\.0\.gate_proj\.weight", name))]
    for base in (match[1] for match in experts):  # the experts of a layer are stored as a single tensor
        parts = {
            each: torch.stack([found.pop(f"{base}.{number}.{each}.weight") for number in range(EXPERTS["num_experts"])])
            for each in ("gate_proj", "up_proj", "down_proj")
        }
        found[f"{base}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], 1)
        found[f"{base}.down_proj"] = parts["down_proj"]
    return found


def _compare_kind(found: Family, text: Path, original: Path, sources: Path) -> Kind:
    from experiments.gguf import llama

    kind = Kind()
    (projector,) = text.parent.glob("mmproj-*")
    _compare_blocks(kind, [text, projector], sources)
    read = _tensors(text)
    wrong = size = 0.0
    for name, each in _originals(original).items():
        if each.ndim > 1 and ".visual." not in name:
            wrong += float((read.get_tensor(name).float() - each).double().square().sum())
            size += float(each.double().square().sum())
    kind.error = (wrong / size) ** 0.5
    ours = _Ours(text)
    model = llama.Model(text, projector)
    exact = text.with_name("exact.gguf")
    llama.quantize(text, exact, "F32")
    dequantized = llama.Model(exact, projector)
    exact.unlink()
    rows = [(ours.logits(ids), model.logits(ids), dequantized.logits(ids)) for ids in map(model.encode, TEXTS)]
    mine, theirs, theirs_exact = (np.concatenate(each) for each in zip(*rows, strict=True))
    kind.text, kind.exact = _distance(mine, theirs), _distance(mine, theirs_exact)
    best = int((mine.argmax(1) == theirs.argmax(1)).sum())
    kind.text_best = f"{best}/{len(mine)}"
    picture = (
        np.random.default_rng(0).integers(0, 256, (SIDE // 32, SIDE // 32, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    )
    mine, before, after, tokens = ours.logits_after_picture(picture)
    for each, name in ((model, "picture"), (dequantized, "picture_exact")):
        theirs, count = each.logits_after_picture(picture, before, after)
        if count != tokens:
            raise RuntimeError(f"llama.cpp's prompt with a picture has {count} tokens, and evoprune's {tokens}")
        setattr(kind, name, _distance(mine, theirs))
        if text.stem.endswith("-F32"):
            found.picture = float(np.abs(mine - theirs).max())
    if text.stem.endswith("-F32"):
        differences = [np.abs(row[0] - row[1]).max() for row in rows]
        found.logits = float(max(differences))
        found.logits_range = float(np.ptp(np.concatenate([row[1] for row in rows])))
    return kind


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.sqrt(np.square(ours - theirs).mean()) / theirs.std())


def _compare_blocks(kind: Kind, files: list[Path], sources: Path) -> None:
    """Compare the dequantized values of all stored tensors with those of the package gguf."""
    from evoprune.session.gguf.blocks import DEQUANTIZE, dequantize
    from evoprune.session.gguf.reader import read_header

    sys.path.insert(0, str(sources / "gguf-py"))
    from gguf import GGUFReader
    from gguf.quants import dequantize as expected

    counts: dict[str, int] = {}
    for file in files:
        infos = read_header(file).tensors
        theirs = {each.name: each for each in GGUFReader(file).tensors}
        if infos.keys() != theirs.keys():
            raise RuntimeError(f"{file} has other tensors than the package gguf reads")
        for name, info in infos.items():
            data = np.fromfile(file, np.uint8, info.size, offset=info.offset)
            kind.tensors += 1
            if info.kind.name in DEQUANTIZE:
                values = dequantize(torch.from_numpy(data), info.kind).numpy()
                kind.same += np.array_equal(values, expected(theirs[name].data, theirs[name].tensor_type).ravel())
            else:
                kind.same += data.tobytes() == theirs[name].data.tobytes()
            if file == files[0] and len(info.shape) > 1:
                counts[info.kind.name] = counts.get(info.kind.name, 0) + 1
    kind.types = ", ".join(sorted(counts, key=counts.__getitem__, reverse=True))


class _Ours:
    """A GGUF file's model in evoprune, with float32 weights."""

    def __init__(self, text: Path):
        from evoprune import VideoQA

        self._qa = VideoQA.load(str(text), dtype="fp32", quantize="none", budget=1.0, offline=True, device="cpu")
        self._loaded = self._qa.loaded

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits after each token, float32 `[tokens, vocabulary]`."""
        language = self._loaded.language
        tokens = torch.tensor(ids, dtype=torch.int64, device="cpu")
        places = torch.arange(len(ids), dtype=torch.int64, device="cpu").expand(3, -1)
        cache = language.new_cache(len(ids))
        return language.logits(language.embed(tokens), places, cache, last=len(ids), ids=tokens).numpy()

    @torch.inference_mode()
    def logits_after_picture(self, picture: np.ndarray) -> tuple[np.ndarray, str, str, int]:
        """Return the logits after a question, float32 `[vocabulary]`, the texts around the picture, and the number of tokens."""
        from PIL import Image

        from evoprune.language import GenerationOptions, prune_prompt
        from evoprune.session import open_inputs
        from evoprune.video import SamplingOptions

        loaded, session = self._loaded, self._qa.session
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "picture.png"
            Image.fromarray(picture).save(path)
            with closing(open_inputs(session, [path], SamplingOptions(max_visual_tokens=10_000))) as opened:
                plans = opened.plans
                encoded = opened.encode().encoded
        prompt = session.fitting_prompt(plans, QUESTION, GenerationOptions(), plans[0].units)
        positions = loaded.positions_of(prompt, plans)
        language = loaded.language
        pruned = prune_prompt(prompt.input_ids, prompt.places, [encoded], positions, language.embed)
        cache = language.new_cache(len(pruned))
        more = {"last": 1, "deepstack": pruned.deepstack, "ids": pruned.ids}
        (logits,) = language.logits(pruned.embeds, pruned.positions, cache, **more).numpy()
        run = prompt.places[0].runs[0]
        ids = prompt.input_ids.tolist()
        before, after = (
            loaded.tokenizer.backend.decode(part, skip_special_tokens=False)
            for part in (ids[: run.start - 1], ids[run.stop + 1 :])
        )
        return logits, before, after, len(ids)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sources", type=Path, required=True, help="folder of llama.cpp")
    parser.add_argument("-o", "--output", type=Path, help="page to write")
    parser.add_argument("--families", default=",".join(LAYERS), help="model types")
    parser.add_argument("--kinds", default=",".join(KINDS), help="types of the text files")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(asdict(compare(args.families, args.sources, args.kinds.split(","), Path(folder)))))
        return
    found: dict[str, dict[str, Any]] = {}
    for family in args.families.split(","):
        command = [
            sys.executable,
            "-m",
            "tests.session.gguf.converted",
            "--once",
            "--sources",
            str(args.sources.absolute()),
        ]
        command += ["--kinds", args.kinds, "--families", family]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if ran.returncode:
            raise SystemExit(f"{family} failed with {ran.returncode}:\n{ran.stdout[-2000:]}{ran.stderr[-4000:]}")
        found[family] = json.loads(ran.stdout.splitlines()[-1])
        print(family, json.dumps(found[family]), flush=True)
    page = _page(found)
    if args.output:
        fill(args.output, BEGIN, END, page)
    print(page)


def _page(found: dict[str, dict[str, Any]]) -> str:
    """Return the tables and the conditions."""
    from evoprune.backend import Device

    heads = (
        "",
        "tensors",
        "largest difference of a tensor",
        "different settings",
        "texts",
        "logits after text",
        "after a picture",
    )
    rows = [
        [
            family, each["tensors"], f"{each['difference']:.1g}", ", ".join(each["differ"]) or "none", each["texts"],
            f"{each['logits']:.0e} of {each['logits_range']:.1f}", f"{each['picture']:.0e}",
        ]
        for family, each in found.items()
    ]  # fmt: skip
    lines = [*table(heads, rows), ""]
    heads = (
        "", "blocks", "equal tensors", "error of weights", "text, float32", "picture, float32", "text", "picture", "best token",
    )  # fmt: skip
    rows = []
    for name in dict.fromkeys(name for each in found.values() for name in each["kinds"]):
        kinds = [each["kinds"][name] for each in found.values() if name in each["kinds"]]
        best = [tuple(map(int, kind["text_best"].split("/"))) for kind in kinds]
        most = {key: max(kind[key] for kind in kinds) for key in ("error", "exact", "picture_exact", "text", "picture")}
        types = dict.fromkeys(part for kind in kinds for part in kind["types"].split(", "))
        same, tensors = (sum(kind[key] for kind in kinds) for key in ("same", "tensors"))
        same_best, all_best = map(sum, zip(*best, strict=True))
        figures = [f"{value:.1g}" if value < 0.001 else f"{value:.3f}" for value in most.values()]
        rows.append([name, ", ".join(types), f"{same} of {tensors}", *figures, f"{same_best} of {all_best}"])
    lines += [*table(heads, rows), ""]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    facts = Device("cpu").environment()
    packages = ", ".join(f"{name} {version(name)}" for name in ("llama-cpp-python", "transformers"))
    lines.append(
        f"{time.strftime('%Y-%m-%d')}, evoprune at commit {commit.strip()}, PyTorch {facts.torch}, {packages}, {facts.device_name}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
