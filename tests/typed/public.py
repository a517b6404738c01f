"""A program that uses all of evoprune's API, for strict type checkers; `main` runs it. docs/guide.md explains each line."""

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

import evoprune


@dataclass
class Shown:
    """A parsed answer."""

    colour: Literal["red", "green"]


def show_progress(done: int, total: int) -> None:
    print(f"{done} of {total}", file=sys.stderr)


def show_stage(stage: str, done: int, total: int) -> None:
    print(f"{stage}: {done} of {total}", file=sys.stderr)


def load() -> evoprune.VideoQA:
    """Use every option of `load`."""
    evoprune.VideoQA.load()
    evoprune.VideoQA.load(Path("demo"), device=torch.device("cpu"), dtype=torch.float32, budget=0.25)
    return evoprune.VideoQA.load(
        "demo",
        progress=show_progress,
        revision=None,
        device="cpu",
        dtype="fp32",
        quantize="none",
        store_quantized=False,
        load_format="auto",
        engine="native",
        offline=True,
        threads="auto",
        budget="fast",
        method="evoprune:alpha=2",
        seed=0,
    )


def encode(qa: evoprune.VideoQA, clip: Path, folder: str) -> evoprune.EncodedInputs:
    """Use every option of `encode`, and every kind of input."""
    frames = np.zeros((24, 112, 168, 3), np.uint8)
    qa.encode(frames, frame_rate=12.0)
    qa.encode(torch.zeros((24, 112, 168, 3), dtype=torch.uint8), times_s=[0.5 * number for number in range(24)])
    qa.encode(clip.read_bytes())
    with open(clip, "rb") as file:
        qa.ask([Image.fromarray(frames[0]), file], "What colour is the square?")
    return qa.encode(
        [clip, str(clip)],
        cache=evoprune.Cache(folder, limit_bytes=2**20),
        progress=show_stage,
        fps=None,
        frames=4,
        start_s=0.0,
        end_s=None,
        max_frames=8,
        max_visual_tokens=1024,
        frame_rate=2.0,
        decoder="pyav",
        seek="exact",
        subtitles="none",
        max_subtitle_tokens=64,
    )


def find(qa: evoprune.VideoQA, clip: Path) -> list[evoprune.Moment]:
    """Use every option of `find`, and all fields of a moment."""
    qa.find(str(clip), ["a green square", "a red ring"])
    moments = qa.find(
        clip,
        "a green square",
        fps=1.0,
        start_s=0.0,
        end_s=4.0,
        progress=show_stage,
        top=2,
        min_score=0.5,
        segment_s=2.0,
        total_tokens=4096,
        prompt="Is there {}?",
        yes="yes",
        no="no",
    )
    for moment in moments:
        print(moment.query, moment.start_s, moment.end_s, moment.best_s, moment.score, file=sys.stderr)
    return moments


def ask(qa: evoprune.VideoQA, video: evoprune.EncodedInputs) -> str:
    """Use every option of `ask`, and all members of an answer."""
    answer: evoprune.Answer = video.ask(
        "What colour is the square?",
        seed=1,
        on_thoughts=print,
        max_new_tokens=8,
        temperature=0.7,
        top_p=0.9,
        top_k=40,
        repetition_penalty=None,
        system=None,
        think="off",
        stop=["\n", "."],
        logprobs=2,
        schema=None,
        regex=None,
    )
    for piece in answer:
        print(piece.upper(), end="", flush=True)
    report: evoprune.Report = answer.report
    kept: int | None = report.pruning.visual_tokens_kept
    first_ms: float | None = report.time_ms.ttft_model
    warnings: list[str] = report.warnings
    again = evoprune.Report.from_json(report.to_json())
    print(kept, first_ms, warnings, again.answer, answer.thoughts, len(answer.ids), video.report.pruning.kept_per_pair)
    chat: evoprune.Chat = video.chat(system="Be brief.", messages=[{"role": "user", "content": "Who?"}][:0])
    said: str = chat.ask("And then?", max_new_tokens=4).text
    messages: list[dict[str, str]] = chat.messages
    undone: str | None = chat.undo()
    chat.clear()
    print(said, messages, undone)
    shown: Shown | None = video.ask("What is shown?", schema=Shown, max_new_tokens=40).parsed
    other: Shown | None = chat.ask("What is shown?", schema=Shown, max_new_tokens=40).parsed
    third: Shown | None = qa.ask(video, "What is shown?", schema=Shown, max_new_tokens=40).parsed
    print(shown and shown.colour, other, third)
    listed = video.ask("What is shown?", schema={"type": "array", "maxItems": 1}, max_new_tokens=40)
    print([*(listed.parsed or [])])
    chosen = video.ask("What colour is the square?", choices=["red", "green"], choice_score="mean")
    print(chosen.text, chosen.choices)
    if answer.logprobs is not None:
        print(answer.logprobs[0]["logprob"], answer.parsed)
    return answer.text + qa.ask([video, "samples/three.mp4"], "Which digit is it?", max_new_tokens=4, stop=".").text


def stream(qa: evoprune.VideoQA, frames: list[np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]]) -> None:
    """Use every option of `stream`, and all members of a stream."""
    with qa.stream(
        fps=2.0,
        max_visual_tokens=None,
        system=None,
        name="camera",
        window_s=2.0,
        memory_s=600.0,
        memory_tokens=None,
    ) as live:
        for number, frame in enumerate(frames):
            looked_at: bool = live.add(frame, number / 2)
            print(looked_at)
        live.flush()
        live.catch_up()
        print(live.ask("What colour is the square?", think="off").text, live.until_s)
        if live.seen is not None:
            print(live.seen.end_s, live.seen.tokens)


def hold(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Use every option of `EvoPrune` on a model that the program holds, and on its tower."""
    settings = evoprune.EvoPrune(
        budget=0.1,
        method="evoprune",
        positions="host",
        seed=0,
        pack="int8",
        pictures=False,
    )
    with settings(model) as run:
        model(**inputs)
    print(run.report.tokens.prompt, run.report)
    if run.columns is not None:
        print(run.columns.index.shape)
    pruned: evoprune.PrunedModel = evoprune.apply(model, budget="balanced", pictures=True, pack=False)
    pruned.remove()
    evoprune.remove(model)
    tower = evoprune.encode(model, inputs["pixel_values_videos"], inputs["video_grid_thw"], budget="fast")
    features: torch.Tensor = tower.features
    print(features.shape, tower.size)


def prepare(clip: str) -> None:
    """Prepare inputs for other programs."""
    inputs = evoprune.processor_inputs("demo", [clip], "What happens?", fps=2.0, system=None, offline=True)
    ids: torch.Tensor = inputs["input_ids"]
    frames, times_s = evoprune.read_frames(clip, frames=4, seek="keyframes", decoder="auto")
    brightest: int = int(frames.max())
    ends_s: float = float(times_s[-1])
    with evoprune.read_ahead(clip, "demo", fps=2.0, device="cpu") as ahead:
        evoprune.VideoQA.load("demo", ahead=ahead).encode(clip, fps=2.0)
    print(ids.shape, brightest, ends_s, evoprune.methods.available()[0].upper())


def main() -> int:
    clip = Path("samples/square.mp4")
    try:
        qa = load()
        with tempfile.TemporaryDirectory() as folder:
            print(ask(qa, encode(qa, clip, folder)))
        find(qa, clip)
        stream(qa, [np.zeros((112, 168, 3), np.uint8) for _ in range(8)])
        prepare(str(clip))
    except evoprune.OutOfMemory as problem:
        print(problem.stage)
    except (evoprune.UsageError, evoprune.VideoError, evoprune.ModelError) as problem:
        print(problem.message, problem.hint, problem.type)
    except evoprune.EvopruneError as problem:
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
