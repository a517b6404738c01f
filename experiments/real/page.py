"""The page and the JSON that `experiments.real` writes. Imported by `experiments.real`; not a script."""

import json
import math
import platform
import statistics
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from evoprune.bundled import DEMOS
from experiments.accuracy.paired import in_points, paired_difference
from experiments.real.plan import BASELINE, BENCHMARKS, Settings, without_folders
from experiments.tables import table

ROOT = Path(__file__).parents[2]
SCHEMA = "evoprune/real@1"
# For each figure of the speed table: its heading, and how it is shown.
SPEED = {
    "first_word_s": ("first word s", "{:.2f}"),
    "tokens_per_s": ("tokens per s", "{:.1f}"),
    "visual_tokens": ("visual tokens", "{:.0f}"),
    "load_s": ("load s", "{:.1f}"),
    "peak_bytes": ("peak GiB", "{:.1f}"),
}
CLIP_SIZE = 360, 640
CLIP_S = 60
CLIP_FPS = 10
DEMO_NOTE = "The demo models are small and were trained on generated clips, so these figures say nothing about published models."


def public_name(model: str) -> str:
    """Return a model's name without the path of its folder."""
    return Path(model).name if Path(model).is_absolute() else model


def write_clip(path: Path) -> None:
    """Write the clip for the speed table: a minute of a square that moves across a textured background."""
    import av

    height, width = CLIP_SIZE
    ground = np.random.default_rng(0).integers(60, 200, (height // 8, width // 8, 3), np.uint8)
    ground = ground.repeat(8, 0).repeat(8, 1)
    made = path.with_name(f"writing-{path.name}")
    with av.open(str(made), "w") as out:
        stream = out.add_stream("libx264", rate=CLIP_FPS, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(CLIP_S * CLIP_FPS):
            frame = ground.copy()
            left = round((width - 80) * number / (CLIP_S * CLIP_FPS))
            frame[140:220, left : left + 80] = (220, 40, 40)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, CLIP_FPS)
            out.mux(stream.encode(picture))
        out.mux(stream.encode())
    made.replace(path)


def commit() -> str | None:
    """Return the checkout's commit, with "+changes" if files were changed, or None outside of a git checkout."""
    try:
        changed = _git("status", "--porcelain", "-uno").strip()
        return _git("rev-parse", "HEAD").strip() + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout  # noqa: S603


def versions() -> dict[str, str | None]:
    found = {}
    for name in ("evoprune", "torch", "transformers", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found | {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}


def new_report(settings: Settings) -> dict[str, Any]:
    """Return a report without results. `write_report` describes its fields."""
    rows = [asdict(row) | {"method": without_folders(row.method)} for row in settings.rows]
    return {
        "schema": SCHEMA,
        "model": public_name(settings.model),
        "demo": settings.model in DEMOS,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "finished_utc": None,
        "commit": commit(),
        "versions": versions(),
        "settings": settings.as_json() | {"model": public_name(settings.model), "rows": rows},
        "parts": {},
        "failed": {},
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write folder/report.json and folder/report.md.

    The JSON has the settings, versions, commit, `parts` with the results of `verify`, `speed`, and each benchmark, and `failed`
    with the reasons of the parts that failed. It has no paths and no questions.
    """
    parts = {name: accuracy(part) if name in BENCHMARKS else part for name, part in report["parts"].items()}
    for path, text in (
        (folder / "report.json", json.dumps(report | {"parts": parts}, indent=1)),
        (folder / "report.md", "\n".join(lines_of(report | {"parts": parts})) + "\n"),
    ):
        made = path.with_name(f"{path.name}.writing")
        made.write_text(text, encoding="utf-8")
        made.replace(path)


def accuracy(results: dict[str, Any]) -> dict[str, Any]:
    """Summarize a benchmark's results: for each row its accuracy, the paired difference to the baseline, and its cost."""
    baseline = results["rows"][BASELINE.name]["samples"]
    rows = {}
    for name, row in results["rows"].items():
        samples = row["samples"]
        difference = None if name == BASELINE.name else paired_difference(samples, baseline)
        counts = [sample["counts"] for sample in samples if sample["counts"]]
        rows[name] = {
            "right": sum(sample["right"] for sample in samples),
            "questions": len(samples),
            "difference": None
            if difference is None
            else [None if math.isinf(value) else value for value in difference],
            "failed": sum(sample["error"] is not None for sample in samples),
            "kept": _mean([count["visual_tokens_kept"] for count in counts]),
            "first_token_s": _mean([count["time_ms"]["ttft_model"] / 1000 for count in counts]),
            "official": row["official"],
        }
    return {key: results[key] for key in ("task", "asked", "of")} | {
        "videos": len({sample["video"] for sample in baseline}),
        "rows": rows,
    }


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else None


def lines_of(report: dict[str, Any]) -> list[str]:
    """Return the lines of the page."""
    about = report["versions"]
    lines = [
        f"# {report['model']}",
        "",
        f"Written by `python -m experiments.real` at commit {report['commit'] or 'unknown'} on {report['created_utc'][:10]}: "
        f"evoprune {about['evoprune']}, torch {about['torch']}, transformers {about['transformers']}, PyAV {about['av']}, "
        f"Python {about['python']}, {about['system']}.",
    ]
    if report["demo"]:
        lines += ["", DEMO_NOTE]
    if part := report["parts"].get("verify"):
        lines += ["", "## Equality with transformers", "", f"`evoprune verify`: {part['verdict']}."]
        lines += ["", *table(["check", "result"], [[c["name"], f"{c['state']}: {c['says']}"] for c in part["checks"]])]
    if part := report["parts"].get("speed"):
        lines += ["", "## Speed", "", *_speed_lines(part)]
    for name, part in report["parts"].items():
        if name in BENCHMARKS:
            lines += ["", f"## {BENCHMARKS[name].title}", "", *_accuracy_lines(part)]
    if report["failed"]:
        lines += [
            "",
            "## Not measured",
            "",
            *(f"- {name}: {' '.join(why.split())}" for name, why in report["failed"].items()),
        ]
    return lines


def _speed_lines(part: dict[str, Any]) -> list[str]:
    device, threads = part["env"]["device_name"], part["env"]["threads"]
    rows = [
        [
            name,
            *(
                _figure(row[key] / 2**30 if key == "peak_bytes" and row[key] else row[key], shape)
                for key, (_, shape) in SPEED.items()
            ),
        ]
        for name, row in part["rows"].items()
    ]
    return [
        f"A clip of {CLIP_S} s and {CLIP_SIZE[1]}x{CLIP_SIZE[0]} pixels, {part['frames']} frames, on {device} ({threads} threads, "
        f"{part['model']['dtype']}, quantize {part['model']['quantize']}). Medians of alternating rounds, each in a process of its "
        "own. The first word is timed from the path, after loading.",
        "",
        *table(["row", *(head for head, _ in SPEED.values())], rows, numbers=True),
    ]


def _accuracy_lines(part: dict[str, Any]) -> list[str]:
    rows = []
    for name, row in part["rows"].items():
        difference = row["difference"]
        if difference is not None:
            difference = in_points(
                *(
                    math.inf * sign if value is None else value
                    for value, sign in zip(difference, (0, -1, 1), strict=True)
                )
            )
        share = f"{100 * row['right'] / row['questions']:.1f}" if row["questions"] else "-"
        rows.append(
            [name, share, difference or "-", _figure(row["kept"], "{:.0f}"), _figure(row["first_token_s"], "{:.2f}")]
        )
    sampled = "all" if part["asked"] == part["of"] else f"{part['asked']} of {part['of']}"
    lines = [
        f"lmms-eval's task `{part['task']}`, {sampled} questions about {part['videos']} inputs, judged by lmms-eval. The "
        "difference from the first row is in percentage points, with a 95% interval over inputs.",
        "",
        *table(["row", "accuracy %", "difference", "tokens kept", "encode + prefill s"], rows, numbers=True),
    ]
    if failed := max(row["failed"] for row in part["rows"].values()):
        lines += [
            "",
            f"{failed} questions could not be asked because their input could not be read. They count as wrong.",
        ]
    return lines


def _figure(value: float | None, shape: str) -> str:
    return "-" if value is None else shape.format(value)
