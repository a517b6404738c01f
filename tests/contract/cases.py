"""The recorded cases, by name. Each case returns the values to record as JSON, field by field.

The name of a field, nested or not, determines how its value is compared. `units ...` are sequences of integers, a few of which may
differ on another processor. `exact ...` is compared only with EVOPRUNE_CONTRACT=exact. In all other fields, floats may differ
slightly and everything else must be equal.

This file contains the commands and calls of users. The cases for methods, models that the caller holds, streams, the vLLM plugin
and other devices are in the files next to it.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

import evoprune
from tests.contract import devices, each_method, held_models, served, streams
from tests.contract.running import command, digest, masked_record, masked_text, packed, process, tokens_of
from tests.contract.small import Held, steps
from tests.prompts import processed
from tests.tiny import tiny_model

CLIP, THREE, PAN, SCENE, PICTURE = (
    "samples/square.mp4",
    "samples/three.mp4",
    "samples/pan.mp4",
    "samples/scenes/crossing.mp4",
    "picture.png",
)
COLOUR, COUNT, HAPPENS = "What colour is the square?", "How many shapes are there?", "What happens to the square?"
METHODS = (
    "evoprune", "none", "evoprune-paper", "evoprune-merge", "divprune", "tome", "cdpruner", "visionzip", "fastv",
    "evoprune+fastv", "random", "mmr", "subsample", "downscale",
)  # fmt: skip


def answered(model: str, inputs: str | list[str], method: str, budget: float | str, *questions: str, **options) -> Held:
    """Ask with `VideoQA` in Python. Returns tokens, answers, and the counts of the reports."""
    qa = evoprune.VideoQA.load(model, method=method, budget=budget, dtype="fp32", device="cpu")
    encoded = qa.encode(inputs)
    held: Held = {}
    for number, question in enumerate(questions):
        answer = encoded.ask(question, **{"max_new_tokens": 12, **options})
        text, record = answer.text, masked_record(json.loads(answer.report.to_json()))
        name = f"answer {number}" if number else "answer"
        held |= {name: text, f"{name} ids": answer.ids, f"{name} tokens": record["tokens"]}
        if not number:
            pruning = record["pruning"]
            held |= {"pruning": brief_pruning(pruning), "warnings": record["warnings"]}
        for each in record["inputs"]:
            each.pop("pruning")
        rest = {k: v for k, v in record.items() if k != "pruning"} | {"args": record["pruning"]["args"]}
        held[f"{name} rest"] = digest(rest)
    return held | tokens_of(encoded.encoded)


def brief_pruning(pruning: dict) -> dict:
    """Return the decisions of a method, from the counts of a report."""
    counts = ("budget", "kept_ratio", "visual_tokens_in", "visual_tokens_kept", "encoder_rows", "encoder_live_share")
    held = {name: pruning[name] for name in (*counts, "kept_per_pair", "positions")}
    lists = {name: steps(pruning[name]) for name in ("layers", "language_layers", "language_work")}
    return held | {name: value for name, value in lists.items() if value is not None}


def said(*steps: tuple[str, ...], stdin: str = "", files: tuple[str, ...] = (), kept: bool = True, run=command) -> Held:
    """Run commands one after another. Returns their exit codes, texts, JSON records, and the files that they wrote.

    If `kept` is False, records are reduced to their main fields and a hash.
    """
    held: Held = {}
    for number, args in enumerate(steps):
        code, out, err = run(*args, stdin=stdin)
        name = f"{number} " if number else ""
        held[f"{name}code"] = code
        held |= held_text(f"{name}out", out, kept)
        if err:
            held[f"{name}err"] = masked_text(err)
    for name in files:
        path = Path(name)
        held |= held_text(name, path.read_text(encoding="utf-8"), kept) if path.exists() else {name: None}
    return held


def held_text(name: str, text: str, kept: bool) -> Held:
    """Return a masked text, or the JSON records in its lines."""
    if not text.startswith("{"):
        return {name: masked_text(text)}
    records = [masked_record(json.loads(line)) for line in text.splitlines()]
    if kept:
        return {f"{name} {number}" if number else name: record for number, record in enumerate(records)}
    return {f"{name} {number}": brief(record) for number, record in enumerate(records)}


def brief(record: dict) -> dict:
    """Return the fields of an answer record that vary most between cases, and a hash of the other fields."""
    parts = ("id", "question", "answer", "finish_reason", "tokens", "warnings", "error", "cache")
    pruning = record.get("pruning") or {}
    pruning = {field: pruning.get(field) for field in ("budget", "encoder_live_share", "kept_per_pair")}
    uncertain = ("pruning", "inputs", "compare", "agreement", "rows")
    rest = {name: value for name, value in record.items() if name not in parts + uncertain}
    return {name: record[name] for name in parts if name in record} | {"pruning": pruning, "rest": digest(rest)}


def quantized() -> Held:
    """Ask with 8-bit weights. CPUs differ in how they multiply those, and so in which of two similar units they keep."""
    held = said((*ASK, "--quantize", "int8", "--json"), kept=False)
    pruning = held["out 0"]["pruning"]
    pruning["exact kept_per_pair"] = pruning.pop("kept_per_pair")
    return held


def help_of(name: str, options: tuple[str, ...] = ("--help", "--help-all")) -> Held:
    held: Held = {}
    for option in options if name else ("--help",):
        code, out, err = command(*name.split(), *option.split())
        held[option or "out"] = [code, digest(out), err]
    return held


def refused(*args: str, stdin: str = "") -> Held:
    code, out, err = command(*args, stdin=stdin)
    return {"code": code, "out": out, "err": masked_text(err)}


def python_refusal(call: Callable) -> Held:
    try:
        call()
    except Exception as problem:
        return {"type": type(problem).__name__, "message": str(problem)}
    return {"type": None}


ONE, TWO = [(5, ("video", 4, 8, 12), 7)], [(5, ("video", 4, 8, 12), 3, ("video", 2, 4, 8), 7)]
ROWS = [(5, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 9, ("video", 1, 4, 4), 2)]
MIXED = [(5, ("image", 8, 8), 2, ("video", 4, 8, 12), 7)]


def inside(family: str, prompt: list, **settings) -> Held:
    """Run `EvoPrune(...)` inside a transformers model. Returns generated ids, top logits, the report and the encoded tokens."""
    model = tiny_model(family=family)
    model.generation_config.pad_token_id = 398
    inputs = processed(model, *prompt)
    stock = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    with evoprune.EvoPrune(**settings)(model) as run:
        out = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        report = masked_record(json.loads(run.report.to_json()))
        with torch.no_grad():
            chosen = model(**inputs).logits[:, -1].argmax(-1)
        columns = run.columns
    length = inputs["input_ids"].shape[1]
    applied = evoprune.apply(model, **settings)
    again = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    shown = repr(applied)
    evoprune.remove(model)
    given = {name: settings[name] for name in ("method", "budget") if name in settings}
    pixels, grids = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    return {
        "stock": stock[:, length:].tolist(),
        "ids": out[:, length:].tolist(),
        "forward": chosen.tolist(),
        "apply is the same": torch.equal(again, out),
        "remove restores": torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), stock),
        "repr": shown,
        "columns": None if columns is None else type(columns).__name__,
        "pruning": brief_pruning(report["pruning"]),
        "tokens": report["tokens"],
        "warnings": report["warnings"],
        "rest": digest({k: v for k, v in report.items() if k not in ("pruning", "tokens", "memory")}),
        **tokens_of(evoprune.encode(model, pixels, grids, **given)),
    }


def as_processor(model: str, inputs: str | list[str], question: str, **sampling) -> Held:
    made = evoprune.processor_inputs(model, inputs, question, offline=True, **sampling)
    held: Held = {}
    for name, value in made.items():
        if value.is_floating_point():
            held[name] = [list(value.shape), round(float(value.mean()), 4), round(float(value.square().mean()), 4)]
            held[f"exact {name}"] = digest(value)
        else:
            held[name] = value.tolist() if value.numel() < 20 else packed(value.flatten().tolist())
    return held


def methods() -> Iterator[tuple[str, Callable[[], Held]]]:
    for method in METHODS:
        # At 0.25, ToMe's choice between flat units depends on the last bits, which differ between processors.
        budget = 0.3 if method == "tome" else 0.25
        yield f"demo {method} {budget} three", partial(answered, "demo", THREE, method, budget, COUNT)
        yield f"demo {method} 0.1 pan", partial(answered, "demo", PAN, method, 0.1, HAPPENS)
        yield f"scenes {method} 0.1", partial(answered, "demo-scenes", SCENE, method, 0.1, "What happens?", COUNT)
    for method in ("evoprune", "none", "evoprune-paper", "tome", "divprune", "fastv"):
        yield f"demo {method} 1.0", partial(answered, "demo", CLIP, method, 1.0, COLOUR)
    for method in ("evoprune", "evoprune-merge", "visionzip", "cdpruner", "downscale"):
        yield f"picture {method}", partial(answered, "demo-scenes", PICTURE, method, 0.25, COLOUR)
    for method in ("evoprune", "tome", "cdpruner", "evoprune+fastv"):
        yield f"two inputs {method}", partial(answered, "demo-scenes", [PICTURE, CLIP], method, 0.25, COLOUR)
    for method, budget in (("evoprune", "auto"), ("mmr", "auto:inflection"), ("evoprune", "fast"), ("tome", "high")):
        yield f"demo {method} {budget}", partial(answered, "demo", CLIP, method, budget, COLOUR, HAPPENS)
    for method in (
        "reuse+mmr",
        "ipcv+divprune",
        "evoprune:first=0.2:rows=1",
        "earlytom",
        "scope",
        "vidcom2",
        "fastvid",
    ):
        yield f"demo {method} 0.25", partial(answered, "demo", "samples/flash.mp4", method, 0.25, COUNT)
    for seed in (0, 7):
        drawn = {"temperature": 1.5, "top_p": 0.95, "seed": seed, "max_new_tokens": 12}
        yield (
            f"demo drawn seed {seed}",
            partial(answered, "demo", CLIP, "evoprune", 0.25, "Describe the video.", HAPPENS, **drawn),
        )
    yield "a folder of frames", partial(answered, "demo", "frames", "evoprune", 0.25, COLOUR)


ASK = ("ask", CLIP, COLOUR)


def commands() -> Iterator[tuple[str, Callable[[], Held]]]:
    for name, typed in {
        "ask": [ASK],
        "ask quiet": [(*ASK, "-q")],
        "ask verbose": [(*ASK, "-v", "-b", "0.1")],
        "ask none verbose": [(*ASK, "-v", "--method", "none")],
        "ask fastv verbose": [(*ASK, "-v", "--method", "fastv", "-b", "0.25")],
        "ask json": [(*ASK, "--json")],
        "ask picture json": [("ask", PICTURE, COLOUR, "--json", "-m", "demo-scenes")],
        "ask two inputs json": [("ask", PICTURE, CLIP, COLOUR, "--json", "-m", "demo-scenes", "-b", "fast")],
        "ask two inputs": [("ask", PICTURE, CLIP, COLOUR, "-m", "demo-scenes")],
        "ask compare": [("ask", THREE, COUNT, "--compare", "-Q", COLOUR)],
        "ask error json": [("ask", "gone.mp4", COLOUR, "--json")],
    }.items():
        yield name, partial(said, *typed)
    for name, more in {
        "compare json": ("--compare", "--json"),
        "questions json": ("-Q", COUNT, "-Q", HAPPENS, "--json"),
        "frames": ("--frames", "5", "--json"),
        "fps": ("--fps", "1", "--json", "--stats"),
        "part": ("--start", "1", "--end", "-1.5", "--json"),
        "few visual tokens": ("--max-visual-tokens", "60", "--json", "--stats"),
        "max frames": ("--max-frames", "4", "--fps", "12", "--json", "--stats"),
        "system": ("--system", "You count.", "-n", "1", "--json"),
        "drawn": ("-t", "2", "--top-k", "50", "--seed", "3", "-n", "8", "--json"),
        "penalty": ("--repetition-penalty", "1.5", "--json"),
        "decord": ("--decoder", "decord", "--json"),
        "subtitles": ("--subtitles", "spoken.srt", "--json", "--stats"),
        "method settings": ("--method", "evoprune:depth=0.5:count=1", "--json"),
        "random weights": ("--load-format", "dummy", "-n", "3", "--json", "--stats"),
        "qwen order": ("--method", "reuse+visionzip", "-b", "10%", "--json", "--stats"),
    }.items():
        yield f"ask {name}", partial(said, (*ASK, *more), kept=False)
    yield "ask int8", quantized
    yield "ask cache", cached
    for name in ("damaged.mp4", "cut.mp4", "cut.webm", "frames"):
        yield f"ask {name}", partial(said, ("ask", name, COLOUR), ("ask", name, COLOUR, "--json"), kept=False)
    yield "ask stdin", partial(said, ("ask", CLIP, "-q"), ("ask", CLIP, "-Q", "-", "-q"), stdin=f"{COLOUR}\n")

    batch = ("batch", "--from", "rows.jsonl", "-m", "demo", "-o", "out/a.jsonl")
    written = {"files": ("out/a.jsonl",), "kept": False}
    yield "batch", partial(said, batch, (*batch, "--resume"), batch, (*batch, "--overwrite", "-q"), **written)
    yield "batch csv", partial(said, ("batch", "--from", "rows.csv", "-m", "demo", "-o", "-", "-b", "fast"), kept=False)
    fast = ("-m", "demo-scenes", "-o", "out/a.jsonl", "--method", "divprune")
    yield "batch videos", partial(said, ("batch", CLIP, "frames", "-Q", COLOUR, "-Q", COUNT, *fast), **written)

    yield "methods", partial(said, ("methods", "--json"))
    yield "methods as text", partial(help_of, "methods", ("",))
    yield "inspect video", partial(said, ("inspect", CLIP), ("inspect", CLIP, "--json"))
    yield "inspect scan", partial(said, ("inspect", "damaged.mp4", "--scan"), ("inspect", "frames", "--json"))
    yield "inspect picture", partial(said, ("inspect", PICTURE, "--json", "-b", "0.1", "--fps", "1"))
    real = ("-m", "Qwen/Qwen2.5-VL-3B-Instruct")
    yield (
        "inspect real model",
        partial(fields_of, ("model", "plan"), "inspect", CLIP, *real, "--frames", "4", "--dtype", "bf16"),
    )
    for method in ("evoprune", "evoprune-merge", "divprune"):
        drawn = ("inspect", CLIP, "--method", method, "-b", "0.1", "--overlay", "out/a.png")
        yield f"inspect overlay {method}", partial(overlay, drawn)
    yield "inspect machine", machine
    yield "version", partial(said, ("--version",))
    yield "process", partial(said, ("ask", CLIP, COLOUR, "-q"), ("ask", "gone.mp4", COLOUR), run=in_process)
    yield "process stdin", partial(said, ("ask", "-", COLOUR, "-q"), run=partial(in_process, clip=CLIP))
    for name in ("", "ask", "batch", "find", "watch", "eval", "tune", "inspect", "profile", "verify", "methods"):
        yield f"help {name}".strip(), partial(help_of, name)
    graded = ("eval", "--data", "samples/questions.jsonl", "--limit", "2", "-b", "0.1", "--method", "evoprune,random")
    yield "eval", partial(said, (*graded, "--json"), (*graded, "-q"), kept=True)


def in_process(*args: str, stdin: str = "", clip: str | None = None) -> tuple[int, str, str]:
    return process(*args, stdin=Path(clip).read_bytes() if clip else stdin.encode())


def overlay(args: tuple[str, ...]) -> Held:
    from PIL import Image

    held = fields_of(("overlay", "memory"), *args)
    with Image.open("out/a.png") as picture:
        pixels = picture.convert("RGB")
    return held | {"size": list(pixels.size), "exact pixels": digest(pixels.tobytes())}


def fields_of(names: tuple[str, ...], *args: str) -> Held:
    """Return these fields of a command's record, without those about the hub's cache."""
    code, out, err = command(*args, "--json")
    record = masked_record(json.loads(out))
    for name in ("on_disk", "download_bytes"):
        record.get("model", {}).pop(name, None)
    return {"code": code, "err": masked_text(err)} | {name: record[name] for name in names}


def cached() -> Held:
    held = said(*[(*ASK, "--cache", "--json")] * 2, kept=False)
    for name, args in {"full": (), "cleared": ("--clear-cache",)}.items():
        record = json.loads(command("inspect", *args, "--json")[1])
        held |= {f"videos when {name}": record["cache"]["videos"], f"fields when {name}": sorted(record["cache"])}
    return held


def machine() -> Held:
    """Return the field names of a report on the machine."""
    code, out, err = command("inspect", "--json")
    record = json.loads(out)
    _, text, _ = command("inspect")
    names = [line.split("  ")[0] for line in text.splitlines() if line[:1].strip()]
    return {"code": code, "err": err, "fields": sorted(record), "methods": record["methods"], "text": names}


def errors() -> Iterator[tuple[str, Callable[[], Held]]]:
    batch, rows = ("batch", CLIP, "-Q", COLOUR, "-m", "demo"), ("-m", "demo", "-o", "out/a.jsonl")
    for args in (
        (),
        ("aks", CLIP, COLOUR),
        ("ask",),
        ("ask", CLIP),
        ("ask", CLIP, "  "),
        ("ask", CLIP, "What", "happens?"),
        ("ask", "gone.mp4", COLOUR),
        ("ask", COLOUR, CLIP),
        ("ask", "no_frames", COLOUR),
        ("ask", "empty.mp4", COLOUR),
        ("ask", "text.mp4", COLOUR),
        ("ask", "broken.png", COLOUR),
        ("ask", "https://example.org/a.mp4", COLOUR, "--offline"),
        (*ASK, "-b", "0"),
        (*ASK, "-b", "1.5"),
        (*ASK, "-b", "tiny"),
        (*ASK, "-b", "tuned"),
        (*ASK, "-b", "auto", "--method", "divprune"),
        (*ASK, "--method", "magic"),
        (*ASK, "--method", "evoprune:speed=1"),
        (*ASK, "--method", "divprune+tome"),
        (*ASK, "--method", "evoprune:first"),
        (*ASK, "--method", "evoprune:first=x"),
        (*ASK, "--method-arg", "first=x"),
        (*ASK, "-m", "no/such model"),
        (*ASK, "-m", "nobody/nothing", "--offline"),
        (*ASK, "-m", "samples"),
        (*ASK, "--fps", "1", "--frames", "2"),
        (*ASK, "--fps", "-1"),
        (*ASK, "--frames", "0"),
        (*ASK, "--start", "soon"),
        (*ASK, "--start", "1:00"),
        (*ASK, "--start", "3", "--end", "2"),
        (*ASK, "--decoder", "vlc"),
        (*ASK, "--device", "abacus"),
        (*ASK, "--dtype", "fp1"),
        (*ASK, "--max-visual-tokens", "0"),
        (*ASK, "-n", "0"),
        (*ASK, "-t", "-1"),
        (*ASK, "--top-p", "0"),
        (*ASK, "--subtitles", "gone.srt"),
        (*ASK, "--interactive"),
        (*ASK, "--fpss", "2"),
        ("ask", CLIP, THREE, COLOUR, "--subtitles", "spoken.srt"),
        ("ask", PICTURE, COLOUR, "--start", "1"),
        (*batch,),
        (*batch[:-2], "-o", "out/a.jsonl"),
        (*batch, "-o", "gone/a.jsonl"),
        (*batch, "-o", "notes.txt"),
        (*batch, "-o", "notes.txt", "--overwrite"),
        (*batch, "-o", "out/a.jsonl", "--resume", "--overwrite"),
        ("batch", CLIP, *rows),
        ("batch", CLIP, "--from", "rows.jsonl", *rows),
        ("batch", "--from", "gone.jsonl", *rows),
        ("batch", "--from", "bad.jsonl", *rows),
        ("batch", "--from", "bad_field.jsonl", *rows),
        ("batch", "--from", "no_question.jsonl", *rows),
        ("batch", "--from", "twice.jsonl", *rows),
        ("batch", "no_frames", "-Q", COLOUR, *rows),
        ("inspect", "gone.mp4"),
        ("inspect", "--scan"),
        ("inspect", CLIP, "--overlay", "a.jpg"),
        ("inspect", CLIP, "--overlay", "out/a.png", "--method", "cdpruner"),
        ("inspect", CLIP, "-m", "samples"),
        ("inspect", CLIP, "b.mp4"),
        ("methods", "x"),
        ("eval", "--data", "gone.jsonl"),
        ("eval", "--data", "demo", "-b", "2"),
        ("profile", "--format", "xml"),
        ("tune", "gone.mp4", "-m", "demo"),
    ):
        yield " ".join(["error:", *args]).replace(f"{CLIP} {COLOUR}", "..."), partial(refused, *args)
    load = evoprune.VideoQA.load
    for name, call in {
        "budget": lambda: load("demo", budget=2),
        "option": lambda: load("demo", speed=1),
        "method": lambda: load("demo", method="magic"),
        "path": lambda: load("demo").encode("gone.mp4"),
        "question": lambda: load("demo").encode(CLIP).ask(""),
        "not entered": lambda: evoprune.EvoPrune(budget=0.1).__enter__(),
        "no model": lambda: evoprune.EvoPrune(budget=0.1)(torch.nn.Linear(2, 2)),
        "downscale": lambda: evoprune.EvoPrune(method="downscale"),
        "question method": lambda: evoprune.EvoPrune(method="cdpruner"),
        "positions": lambda: evoprune.EvoPrune(positions="x"),
        "remove": lambda: evoprune.remove(torch.nn.Linear(2, 2)),
        "processor": lambda: evoprune.processor_inputs("demo", "gone.mp4", COLOUR),
    }.items():
        yield f"Python error: {name}", partial(python_refusal, call)


def transformers() -> Iterator[tuple[str, Callable[[], Held]]]:
    for family, prompt, name, settings in (
        ("qwen2_5_vl", ONE, "one", {"budget": 0.25}),
        ("qwen2_5_vl", ONE, "one", {"budget": 1.0}),
        ("qwen2_5_vl", ROWS, "rows", {"budget": 0.1}),
        ("qwen2_5_vl", TWO, "two", {"budget": 0.25, "method": "evoprune-paper"}),
        ("qwen2_5_vl", ONE, "one", {"budget": 0.25, "method": "tome", "positions": "qwen"}),
        ("qwen2_5_vl", MIXED, "mixed", {"budget": 0.25, "method": "divprune", "pictures": True}),
        ("qwen2_5_vl", ONE, "one", {"budget": 0.25, "method": "none"}),
        ("qwen2_vl", ONE, "one", {"budget": 0.25, "method": "visionzip"}),
        ("qwen2_vl", TWO, "two", {"budget": "fast"}),
        ("qwen3_vl", ONE, "one", {"budget": 0.25}),
        ("qwen3_vl", TWO, "two", {"budget": 0.25, "method": "evoprune-merge"}),
    ):
        named = " ".join(map(str, settings.values()))
        yield f"inside {family} {name} {named}", partial(inside, family, prompt, **settings)
    yield "processor inputs", partial(as_processor, "demo", CLIP, COLOUR, fps=1)
    yield "processor inputs of two", partial(as_processor, "demo-scenes", [PICTURE, CLIP], COLOUR, system="Be brief.")


# Cases by the kind of test that checks them.
KINDS = {
    "public": (methods, commands, errors, transformers),
    "each method": (each_method.cases,),
    "held models": (held_models.cases,),
    "live": (streams.cases,),
    "served": (served.cases,),
    "devices": (devices.cases,),
}
NAMED = {kind: {name: run for cases in made for name, run in cases()} for kind, made in KINDS.items()}
CASES = {name: run for cases in NAMED.values() for name, run in cases.items()}
