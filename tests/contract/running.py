"""Run the public API in a separate folder, and mask everything in its output that differs from run to run.

Nothing here uses internal modules. Commands run through `evoprune_cli.main.run`, everything else uses public names of `evoprune`.
"""

import base64
import functools
import hashlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import warnings
import zlib
from collections.abc import Callable, Sequence
from contextlib import chdir, contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).parents[2]
# Environment variables that change the behaviour or output of commands.
UNSET = re.compile(r"EVOPRUNE_|NO_COLOR$|FORCE_COLOR$|LINES$|_TYPER|TTY_")
TIMES = r"(plan|read|preprocess|encode|  pruning|prefill|generate|pack|first token|total|startup|encode \+ prefill)"
SHORT = r"(compile|store|  overlap) +-?\d"  # lines of the stats that appear only if they take a millisecond
# Fields that were added after the recording. They are left out if they are null.
LATER = ("stop_reason", "logprobs", "stop", "parsed", "schema", "regex", "choices", "startup")
MASKED_FIELDS = ("time_ms", "rate", "memory", "env", "available", "versions", "devices", "cache_folder")


def materials(folder: Path) -> Path:
    """Create everything that cases read: samples, an image, a folder of frames, broken files, rows, subtitles."""
    (folder / "samples").symlink_to(ROOT / "samples")
    y, x = np.mgrid[:112, :168]
    ground = np.stack([x, y, 255 - x], -1).astype(np.uint8)
    picture = ground.copy()
    picture[30:80, 50:100] = (255, 0, 0)
    Image.fromarray(picture).save(folder / "picture.png")
    (folder / "frames").mkdir()
    for number in range(8):
        frame = ground.copy()
        frame[40:68, 14 * number : 14 * number + 28] = (0, 255, 0)
        Image.fromarray(frame).save(folder / "frames" / f"{number:03}.png")
    (folder / "no_frames").mkdir()
    whole = (ROOT / "samples/square.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.mp4").write_bytes(whole[:47_602] + b"\xff" * 1936 + whole[49_538:])  # damages two packets
    (folder / "cut.webm").write_bytes((ROOT / "samples/vanish.webm").read_bytes()[:12_000])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("This is no video.\n" * 20)
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:200])
    (folder / "spoken.srt").write_text("1\n00:00:01,000 --> 00:00:03,000\nThe square is green.\n\n")
    rows = [
        {"id": "a", "video": "samples/square.mp4", "question": "What colour is the square?", "answer": "green"},
        {"id": "b", "video": "samples/three.mp4", "question": "How many shapes are there?", "options": ["3", "4"]},
        {"id": "c", "video": "missing.mp4", "question": "What happens?"},
        {"id": "d", "video": "samples/square.mp4", "question": "What happens to the square?", "start": 1, "end": 5},
        {"id": "e", "video": "samples/three.mp4", "question": "What shape is green?", "fps": 1, "max_new_tokens": 2},
        {"id": "f", "inputs": ["picture.png", "samples/square.mp4"], "question": "What colour is the square?"},
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["id,video,question,answer,split", "1,samples/pan.mp4,What happens?,pans,x", "2,frames,What moves?,,y"]
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    (folder / "bad.jsonl").write_text('{"video": "samples/square.mp4", "question": "a"}\nno JSON\n')
    (folder / "bad_field.jsonl").write_text('{"video": "samples/square.mp4", "question": "a", "start": "soon"}\n')
    (folder / "no_question.jsonl").write_text('{"video": "samples/square.mp4"}\n')
    (folder / "twice.jsonl").write_text('{"id": "a", "video": "v.mp4", "question": "q"}\n' * 2)
    (folder / "notes.txt").write_text("Notes.\n")
    (folder / "recipe.json").write_text(json.dumps(recipe()))
    return folder


def recipe() -> dict:
    """Return a made-up result of `evoprune tune --operations` for the demo model."""
    steps = (
        ((2, "rest", "mlp"), (2, "rest", "queries"), (3, "rest", "keys")),
        ((1, "all", "mlp"),),
        ((2, "rest", "keys"), (1, "rest", "queries")),
        ((1, "all", "keys"), (1, "rest", "keys")),
        ((2, "all", "mlp"), (2, "all", "queries")),
        ((2, "all", "keys"), (3, "all", "keys"), (1, "all", "queries")),
    )
    return {
        "schema": "evoprune/tune-operations@1",
        "complete": True,
        "recipe": {"depth": 4, "after": 1, "key": 0.25, "weights": [0.1, 0.2, 0.7]},
        "steps": [{"operations": step} for step in steps],
    }


@contextmanager
def running(folder: Path):
    """Run in the folder of materials, with a new `out` in it, in one thread, and with a fixed environment."""
    for name in ("out", "cache", "config"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "out").mkdir()
    env = {name: value for name, value in os.environ.items() if not UNSET.match(name)}
    env |= {"COLUMNS": "80", "TERM": "xterm", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"XDG_CACHE_HOME": str(folder / "cache")}
    threads, hook = torch.get_num_threads(), sys.excepthook
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        torch.set_num_threads(1)
        with patch.dict(os.environ, env, clear=True), chdir(folder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.excepthook = hook
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


class Terminal(io.StringIO):
    """Text that is typed at a terminal."""

    def isatty(self) -> bool:
        return True


def command(*args: str, stdin: str | io.StringIO = "") -> tuple[int, str, str]:
    """Run `evoprune ARGS` in this process. Returns exit code, stdout, stderr."""
    import typer.main

    from evoprune_cli import main

    with (
        open("out.log", "w+", encoding="utf-8") as out,
        open("err.log", "w+", encoding="utf-8") as err,
        patch.object(sys, "argv", ["evoprune", *args]),
        patch.object(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin),
        patch.object(sys, "stdout", out),
        patch.object(sys, "stderr", err),
        patch.object(typer.main, "get_command", parser()),
        patch.object(main, "plugged", dict),  # no commands of other packages
    ):
        try:
            main.run()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        out.flush(), err.flush()
        said = [Path(name).read_text(encoding="utf-8") for name in ("out.log", "err.log")]
    return code, *said


@functools.cache
def parser() -> Callable:
    """Cache Typer's parser, which would otherwise be rebuilt for every call."""
    import typer.main

    return functools.cache(typer.main.get_command)


def process(*args: str, stdin: bytes = b"") -> tuple[int, str, str]:
    """Run `python -m evoprune_cli ARGS`. Returns exit code, stdout, stderr."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "evoprune_cli", *args], input=stdin, capture_output=True, env=env)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def masked_text(text: str) -> str:
    """Mask times, memory, versions, local paths, and the column widths that depend on them."""
    text = text.replace(str(ROOT), "{root}").replace(os.getcwd(), "{folder}").replace(str(Path.home()), "{home}")
    lines = []
    for line in text.splitlines():
        if re.match(SHORT, line):
            continue
        if row := re.match(rf"{TIMES}  +(?=[\d,.<]+)(.*)$", line):
            name, rest = row.groups()
            rest = re.sub(r"^[\d,.<]+\s*#*\s*", "N ", rest)
            line = f"{name} {rest if re.match('  |plan|read|pre|enc|gen', name) else re.sub(r'[0-9][0-9,.]*x?', 'N', rest)}"
            line = re.sub(r"^encode \+ prefill .*", "encode + prefill N", line)
        line = re.sub(r"^(versions|device|load) .*", r"\1", line)
        line = re.sub(r"^  (enough|seconds) .*", r"  \1", line)
        line = re.sub(r"\b(read|preprocess|encode) [\d,]+(?=,| ms)", r"\1 N", line)
        line = re.sub(r"\d+:\d\d(\.\d)?, [\d.,]+ rows/(s|min|h)\b", "N rows/s", line)
        line = re.sub(r"waited ([\d.]+ s\b|\d+:\d\d(\.\d)?)", "waited N", line)
        line = re.sub(r"[\d.,]+ tok/s", "N tok/s", line)
        line = re.sub(r"[\d.,]*\d (ms|[KMG]iB)\b", lambda found: f"N {'ms' if found[1] == 'ms' else 'MiB'}", line)
        line = re.sub(r"\(\d+ threads?\)", "(N threads)", line)
        lines.append(re.match(" *", line)[0] + " ".join(line.split()))
    return "\n".join(lines)


def names_of(fields: dict) -> str:
    """Return the names of fields whose values are not recorded, marking those that are null."""
    return " ".join(f"{name}=null" if value is None else name for name, value in sorted(fields.items()))


def masked_record(record):
    """Mask a JSON record: only names for times, memory and versions, no file states. A repeated record is marked as the same."""
    if isinstance(record, list):
        return [masked_record(each) for each in record]
    if not isinstance(record, dict):
        return masked_text(record) if isinstance(record, str) and "/" in record else record
    made = {}
    for name, value in record.items():
        if name == "files" and isinstance(value, dict):
            continue
        if name in LATER and value is None:
            continue
        if name == "created_utc" or (name == "id" and re.fullmatch("[0-9a-f]{16,32}", str(value))):
            made[name] = type(value).__name__
        elif name in MASKED_FIELDS and isinstance(value, dict):
            made[name] = names_of({key: each for key, each in value.items() if key not in LATER or each is not None})
        elif name.endswith(("_ms", "seconds")) or name in ("python", "platform", "folder", "hub_cache"):
            made[name] = type(value).__name__
        else:
            made[name] = masked_record(value)
    for each in made.get("inputs") or ():
        if isinstance(each, dict):
            for name in ("video", "sampling", "pruning", "time_ms"):
                if name in each and each[name] == made.get(name):
                    each[name] = "as above"
    return made


def where() -> dict[str, str]:
    """Return the versions that third-party answers and texts depend on. Records made with other versions do not apply."""
    names = ("torch", "transformers", "av", "typer", "pillow")
    return {name: ".".join(version(name).split(".")[:2]) for name in names} | {"machine": platform.machine()}


def digest(value) -> str:
    """Return length and hash of a text, bytes, a tensor or a JSON value."""
    if isinstance(value, torch.Tensor):
        shape = "x".join(map(str, value.shape))
        return f"{shape} {digest(value.detach().contiguous().view(torch.uint8).numpy().tobytes())}"
    if not isinstance(value, bytes | str):
        value = json.dumps(value, sort_keys=True)
    data = value.encode() if isinstance(value, str) else value
    return f"{len(data)}:{hashlib.sha256(data).hexdigest()[:16]}"


def packed(numbers: Sequence[int]) -> str:
    """Pack integers into a short text: their count, and their differences as base 85 of compressed int16."""
    steps = np.diff(np.asarray(numbers, np.int64), prepend=0).astype(np.int16)
    return f"{len(numbers)}:{base64.b85encode(zlib.compress(steps.tobytes(), 9)).decode()}"


def unpacked(text: str) -> list[int]:
    steps = np.frombuffer(zlib.decompress(base64.b85decode(text.partition(":")[2])), np.int16)
    return steps.astype(np.int64).cumsum().tolist()


def tokens_of(encoded) -> dict:
    """Return the kept units of an `Encoded`, and for each unit the first unit that shares its row.

    If there are many units, the second value is replaced by a hash.
    """
    first: dict[int, int] = {-1: -1}
    owner = [first.setdefault(row, unit) for unit, row in enumerate(encoded.unit_to_row.tolist())]
    return {
        "units kept": packed(encoded.kept.tolist()),
        "rows": [len(set(owner)), len(encoded.rows)],
        "units owner" if len(owner) < 200 else "exact owner": packed(owner) if len(owner) < 200 else digest(owner),
        "grids": [list(grid) for grid in encoded.grids],
        "length": round(float(encoded.features.double().norm()), 3) if len(encoded.features) else 0.0,
        "exact features": digest(encoded.features),
        "exact size": None if encoded.size is None else digest(encoded.size),
    }
