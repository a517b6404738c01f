"""Run one step of `experiments.speed.gpu`, which starts this script as `python -m experiments.speed.gpu_steps STEP -o FILE`.

A step writes its results to FILE (JSON) after each turn, and does not start a turn after `--seconds`. The weights have the
published model's dimensions but are random, because the speed does not depend on their values.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

BEGUN = time.perf_counter()
QUESTION = "What happens in the video?"
HF = "HF"
HF_VARLEN = "HF+"
FULL = "ours 1.0"
INSIDE = "evoprune:inner=always"  # the setting that a GPU uses for larger inputs


class Record:
    """A step's results so far, in `found`. `save` writes them to the step's file, and `left` is the remaining time in seconds."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.found = {}

    @property
    def left(self) -> float:
        return self.args.seconds - (time.perf_counter() - BEGUN)

    def save(self, **found: Any) -> None:
        self.found |= {"env": self.found.get("env") or environment(self.args.device)} | found
        written = self.args.output.with_suffix(".writing")
        written.write_text(json.dumps(self.found), encoding="utf-8")
        written.replace(self.args.output)  # atomic, so that the file is complete even if the process is killed


def environment(device: str) -> dict[str, Any]:
    """Return the GPU name and the versions of the packages that use it."""
    import torch

    found = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "triton", "flash_attn", "flash-linear-attention", "causal-conv1d"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    cuda = device.startswith("cuda")
    return found | {
        "device": torch.cuda.get_device_name(device) if cuda else device,
        "threads": torch.get_num_threads(),
    }


# Models and clips, as in `evoprune profile`.


def bench_of(args: argparse.Namespace, new_tokens: int, methods: Sequence[str] = ("evoprune",)):
    """Return the `Bench` that `evoprune profile` would use, and its rows. `bench.run(row)` measures one turn of a row."""
    from evoprune.backend import DeviceName
    from evoprune.bench import Case, Profile, ProfileSettings
    from evoprune.session import ModelOptions

    options = ModelOptions(model=args.model, device=args.device, dtype=args.dtype)
    cases = [Case(*map(int, case.split("x"))) for case in args.cases]
    settings = ProfileSettings(budgets=tuple(args.budgets), methods=tuple(methods), new_tokens=new_tokens)
    profile = Profile(settings, options, cases, exact=False)  # makes all models have the same number of units
    unit = profile.model.limits["video"].unit
    bench, rows = profile.bench()

    def measured(row) -> bool:
        # DivPrune, which selects after the tower, runs only at the first budget. `INSIDE` runs only where it differs from
        # `evoprune`.
        if row.method == INSIDE:
            units = row.case.frames // 2 * (row.case.height // unit) * (row.case.width // unit)
            return units < DeviceName("cuda").launch_bound_units
        return row.method != "divprune" or row.budget == args.budgets[0]

    rows = [row for row in rows if measured(row)]
    return bench, rows


def label(row) -> str:
    if row.method is None:
        return HF
    return FULL if row.method == "none" else f"{row.method} {row.budget:g}"


def varlen_attention(q, k, v, ends, longest: int):
    """Compute attention within groups of rows `[n, heads, d]` using a single kernel call on a GPU.

    `ends` contains the group boundaries as int32, starting with 0. `longest` is the size of the largest group.
    """
    import torch

    if q.device.type != "cuda":  # compute one group at a time, which works on any device
        import torch.nn.functional as F

        pieces = zip(*(x.transpose(0, 1).split(ends.diff().tolist(), 1) for x in (q, k, v)), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*piece).transpose(0, 1) for piece in pieces])
    try:
        from flash_attn import flash_attn_varlen_func as kernel
    except ImportError:
        from torch.nn.attention.varlen import varlen_attn as kernel
    return kernel(q, k, v.contiguous(), ends, ends, longest, longest)


@contextmanager
def varlen_tower(bench) -> Iterator[None]:
    """Make transformers' tower call a varlen kernel once per layer instead of looping over windows, as FlashAttention does."""
    attention = type(bench._reference.model.visual.blocks[0].attn)
    rotate = sys.modules[attention.__module__].apply_rotary_pos_emb_vision
    plain = attention.forward
    groups = {}  # size of the longest group, read once for all layers

    def forward(self, hidden_states, cu_seqlens, position_embeddings=None, **_):
        if id(cu_seqlens) not in groups:
            groups[id(cu_seqlens)] = cu_seqlens, cu_seqlens.int(), int(cu_seqlens.diff().max())
        _, ends, longest = groups[id(cu_seqlens)]
        rows = len(hidden_states)
        q, k, v = self.qkv(hidden_states).reshape(rows, 3, self.num_heads, -1).unbind(1)
        q, k = rotate(q, k, *position_embeddings)
        return self.proj(varlen_attention(q, k, v, ends, longest).reshape(rows, -1))

    attention.forward = forward
    try:
        yield
    finally:
        attention.forward = plain


# The steps.


def table(record: Record) -> None:
    """Measure transformers, transformers with a varlen kernel, and evoprune in turn. The first turn of each row is a warm-up."""
    bench, rows = bench_of(record.args, 8, ("evoprune", INSIDE, "divprune"))
    record.save(ready_s=time.perf_counter() - BEGUN)
    turns: dict[tuple[str, str], list] = {}
    errors: dict[tuple[str, str], str] = {}
    todo = []
    for row in rows:
        todo.append((row, label(row), nullcontext))
        if label(row) == HF:
            todo.append((row, HF_VARLEN, lambda: varlen_tower(bench)))
    for number in range(-1, record.args.rounds):
        for row, name, how in todo:
            key = (case_text(row.case), name)
            turn = row.error
            if key in errors or (record.left < 0 and turns.get(key)):
                continue
            if turn is None:
                with how():
                    turn = bench.run(row)
            if isinstance(turn, str):
                errors[key] = turn
            elif number >= 0 or record.left < 0:  # the warm-up is counted if there is no time for another turn
                turns.setdefault(key, []).append(turn)
        record.save(rows=rows_of(turns, errors), seconds_left=record.left)


def case_text(case) -> str:
    return f"{case.frames}x{case.height}x{case.width}"


def rows_of(turns: dict[tuple[str, str], list], errors: dict[tuple[str, str], str]) -> list[dict[str, Any]]:
    """Return the medians of each row's turns, and the first-token speedups over transformers and over evoprune at 1.0."""
    made = []
    for (case, name), own in turns.items():
        ms = {stage: 1000 * median(getattr(t.sample, stage) for t in own) for stage in ("encode", "prune", "prefill")}
        passes = len(own[0].tokens) - 1
        made.append(
            {"case": case, "row": name, "turns": len(own)}
            | {stage: round(value, 2) for stage, value in ms.items()}
            | {
                "first_token": round(1000 * median(t.sample.first_token for t in own), 2),
                "token": round(1000 * median(t.sample.generate for t in own) / passes, 3),
                "peak_bytes": max(t.sample.peak_bytes or 0 for t in own) or None,
                "tokens": own[0].counts.tokens,
                "prompt": own[0].counts.prompt,
                "first_tokens": own[0].tokens[:4],
            }
        )
    first = {(row["case"], row["row"]): row["first_token"] for row in made}
    for row in made:
        for name, other in (("vs_hf", HF), ("vs_hf_varlen", HF_VARLEN), ("vs_full", FULL)):
            base = first.get((row["case"], other))
            row[name] = base and round(base / row["first_token"], 3)
    return made + [{"case": case, "row": name, "error": error} for (case, name), error in errors.items()]


def decoding(record: Record) -> None:
    """Measure the time per token after the prompt. The first turn of each row is recorded separately.

    With `--hf`, transformers' forward pass in a loop and its `generate` are also measured.
    """
    args = record.args
    bench, rows = bench_of(args, args.tokens)
    rows = [row for row in rows if label(row) != HF or args.hf]
    found: dict[str, list[float]] = {}
    tokens: dict[str, list[int]] = {}
    ways: dict[str, Callable[[], tuple[float, list[int]]]] = {
        label(row): lambda row=row: forced(bench, row) for row in rows
    }
    if args.hf:
        ways["HF generate"] = lambda: generated(bench, args.tokens)
    for _ in range(args.rounds):
        for name, run in ways.items():
            if name in found and record.left < 0:
                continue
            ms, tokens[name] = run()
            found.setdefault(name, []).append(ms)
            later = {name: median(each[1:] or each) for name, each in found.items()}
            first = {name: each[0] for name, each in found.items()}
            record.save(token_ms=later, first_turn_ms=first, tokens=tokens, prompt_case=args.cases[0])


def forced(bench, row) -> tuple[float, list[int]]:
    """Run one turn of a row, and return the milliseconds per generated token and the tokens."""
    turn = bench.run(row)
    if isinstance(turn, str):
        raise RuntimeError(turn)
    return 1000 * turn.sample.generate / (len(turn.tokens) - 1), turn.tokens


def generated(bench, count: int) -> tuple[float, list[int]]:
    """Run transformers' `generate` on text as long as the smallest prompt. Returns the milliseconds per token and the tokens.

    The time to generate one token is subtracted from the time to generate `count` tokens.
    """
    import torch

    from evoprune.backend import Device

    (clip, *_), reference = bench._clips.values(), bench._reference
    ids = clip.ids.clamp(min=5, max=500)[None].to(clip.patches.device)  # no image or video placeholders

    def seconds(length: int) -> tuple[float, list[int]]:
        begun = Device(ids.device).now()
        how = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
        with torch.inference_mode():
            made = reference.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        return Device(ids.device).now() - begun, made[0, ids.shape[1] :].tolist()

    one, (all_, tokens) = seconds(1)[0], seconds(count)
    return 1000 * (all_ - one) / (count - 1), tokens


def first(record: Record) -> None:
    """Measure the first question that a process answers after loading, followed by the same question again."""
    args = record.args
    import torch

    import evoprune

    video_qa = evoprune.VideoQA  # triggers the import
    steps = {"import": time.perf_counter() - BEGUN}
    with tempfile.TemporaryDirectory() as folder:
        video, options = (
            sample(Path(folder)),
            {"device": args.device, "dtype": args.dtype, "load_format": args.load_format},
        )
        options["budget"] = "full" if args.budgets[0] == 1 else args.budgets[0]
        begun = time.perf_counter()
        qa = video_qa.load(args.model, **options)
        if args.device.startswith("cuda"):
            torch.cuda.synchronize(args.device)
        steps["load"] = time.perf_counter() - begun
        record.save(seconds={k: round(v, 3) for k, v in steps.items()}, video=video.name, asked=[])

        def ask() -> dict[str, Any]:
            begun = time.perf_counter()
            answer = qa.encode(video).ask(QUESTION, max_new_tokens=args.tokens)
            text = answer.text
            whole = time.perf_counter() - begun
            report = answer.report
            times = {name: value for name, value in vars(report.time_ms).items() if value is not None}
            return {"whole_ms": 1000 * whole, "time_ms": times, "tokens": vars(report.tokens), "answer": text[:80]}

        for _ in range(args.rounds):
            if not record.found["asked"] or record.left > 0:
                record.found["asked"].append(ask())
                record.save()


def sample(folder: Path) -> Path:
    """Return the sample clip `pan.mp4` or, if PyAV is not installed, a folder of similarly sized frames."""
    from importlib.util import find_spec

    if find_spec("av"):
        return Path(__file__).parents[2] / "samples/pan.mp4"
    from PIL import Image

    from evoprune.bench import synthetic_clip

    (folder / "frames").mkdir()
    for number, frame in enumerate(synthetic_clip("motion", 24, 224, 252)):
        Image.fromarray(frame).save(folder / "frames" / f"{number:02}.png")
    return folder / "frames"


STEPS = {"table": table, "decoding": decoding, "first": first}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m experiments.speed.gpu_steps", description=__doc__.partition("\n")[0])
    made.add_argument("step", choices=STEPS)
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("-m", "--model", required=True)
    made.add_argument("--device", default="cuda")
    made.add_argument("--dtype", default="auto")
    made.add_argument("--load-format", default="auto", help="for the step `first`")
    made.add_argument("--cases", nargs="+", default=["8x224x336"], metavar="FRAMESxHEIGHTxWIDTH")
    made.add_argument("-b", "--budgets", nargs="+", type=float, default=[0.25])
    made.add_argument("--rounds", type=int, default=3)
    made.add_argument("--tokens", type=int, default=64, help="tokens per answer")
    made.add_argument("--seconds", type=float, default=60.0, help="time after which no turn starts")
    made.add_argument("--hf", action="store_true", help="for the step decoding: use transformers")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    STEPS[args.step](Record(args))


if __name__ == "__main__":
    main()
