"""Answer questions for `experiments.speed.first_word` with one loaded model: evoprune at a budget, or plain transformers.

`python -m experiments.speed.first_word_asks SIDE -m CKPT` answers requests from stdin until end of file (see `serve`). With `--once
FILE`, it asks a single question and prints each word of the answer as it arrives.

transformers gets its inputs in the fastest way available. The frames come from the fastest importable reader, and are resized by
torch and cut into patches. The patches are the same as from transformers' processor, which would require torchvision. The frame
timestamps and the frame size are the same as for evoprune.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from experiments.speed.processes import serve

QUESTION = "What happens in the video?"
TRANSFORMERS = "transformers"
# Modules and the names of the readers that need them, fastest first.
FEEDS = {"torchcodec": "torchcodec", "decord": "decord", "av": "PyAV, seeking"}
Word = Callable[[str], None]  # called with each piece of the answer


class Ours:
    """Answers questions with evoprune's `VideoQA` at one budget."""

    def __init__(self, args: argparse.Namespace):
        begun = time.perf_counter()
        from evoprune import VideoQA

        how = {"device": args.device, "threads": "auto", "offline": True}
        self._qa = VideoQA.load(args.model, budget=args.side, **how)
        self.facts = {"load": time.perf_counter() - begun}

    def ask(self, video: str, frames: int | None, new_tokens: int, word: Word) -> dict[str, Any]:
        os.utime(video)  # a new mtime invalidates the patches cached by an earlier question
        begun = time.perf_counter()
        if frames is None:
            answer = self._qa.ask(video, QUESTION, max_new_tokens=new_tokens)
        else:
            answer = self._qa.encode(video, frames=frames).ask(QUESTION, max_new_tokens=new_tokens)
        moments = []
        for piece in answer:
            moments.append(time.perf_counter() - begun)
            word(piece)
        report = answer.report
        return {
            "first_word": moments[0],
            "second_word": moments[1] if len(moments) > 1 else None,
            "last_word": moments[-1],
            "encode": report.time_ms.encode / 1000,
            "prefill": report.time_ms.prefill / 1000,
            "words": report.tokens.new,
            "visual": report.tokens.visual,
            "prompt": report.tokens.prompt,
            "frames": report.sampling.frames,
            "size": report.sampling.resized_hw,
            "seek": report.sampling.seek,
            "dtype": report.model.dtype,
            "threads": report.env.threads,
        }


class Transformers:
    """Answers questions with transformers' `generate`, using the same weights and dtype, and a KV cache."""

    def __init__(self, args: argparse.Namespace):
        begun = time.perf_counter()
        import torch
        from transformers import AutoModelForImageTextToText

        from evoprune.language import Tokenizer
        from evoprune.session import (
            DTYPES,
            ModelOptions,
            describe,
            prompt_about,  # noqa: F401 (imported here so that no question waits for it)
        )

        found = describe(ModelOptions(args.model, device=args.device, offline=True))
        self._found = found
        self._device = torch.device(found.device)
        self._dtype = DTYPES[found.dtype]
        self._tokenizer = Tokenizer.load(found.folder)
        flash = find_spec("flash_attn") is not None and self._device.type == "cuda"
        how = {"dtype": self._dtype, "attn_implementation": "flash_attention_2" if flash else "sdpa"}
        self._model = AutoModelForImageTextToText.from_pretrained(found.folder, **how).to(found.device).eval()
        self._feed = first_feed()
        self._passed: dict[str, float] = {}  # times at which the tower started and finished
        tower = self._model.model.visual
        tower.register_forward_pre_hook(lambda *_: self._note("encode begins"))
        tower.register_forward_hook(lambda *_: self._note("encode ends"))
        self._now = _clock(self._device)
        self.facts = {
            "load": time.perf_counter() - begun,
            "reader": self._feed,
            "attention": how["attn_implementation"],
            "threads": torch.get_num_threads(),
        }

    def _note(self, what: str) -> None:
        self._passed.setdefault(what, self._now())

    def ask(self, video: str, frames: int | None, new_tokens: int, word: Word) -> dict[str, Any]:
        import torch
        from transformers import GenerationConfig

        plan = self._plan(video, frames)
        self._passed = {}
        begun = self._now()
        inputs = {name: value.to(self._device) for name, value in self._inputs(plan).items()}
        words = _Words(lambda: self._now() - begun, self._tokenizer, word)
        greedy = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        with torch.inference_mode():
            self._model.generate(**inputs, generation_config=greedy, streamer=words)
        moments = words.moments
        encode_begins, encode_ends = (self._passed[name] - begun for name in ("encode begins", "encode ends"))
        return {
            "first_word": moments[0],
            "second_word": moments[1] if len(moments) > 1 else None,
            "last_word": moments[-1],
            "encode": encode_ends - encode_begins,
            "prefill": moments[0] - encode_ends,
            "words": len(moments),
            "visual": plan.visual_tokens,
            "prompt": inputs["input_ids"].shape[1],
            "frames": plan.sampling.frames,
            "size": [plan.height, plan.width],
            "seek": "exact",
            "dtype": self._found.dtype,
            **self.facts,
        }

    def _plan(self, video: str, frames: int | None):
        """Return the plan that evoprune would use, so that the frame timestamps and frame size are the same."""
        from evoprune.video import Plan, SamplingOptions, probe

        info = probe(video)
        sampling = replace(SamplingOptions(frames=frames), max_visual_tokens=self._found.max_visual_tokens)
        return Plan.of(info, self._found.limits[info.kind], sampling)

    def _inputs(self, plan) -> dict[str, Any]:
        """Return the transformers model's inputs, identical to what its processor would create from the video and the question."""
        import torch

        from evoprune.session import prompt_about
        from evoprune.vision import normalised, patches_of

        vision = self._found.config.vision_config
        limits = self._found.limits[plan.kind]
        prompt = prompt_about(self._tokenizer, vision, [plan], QUESTION, None)
        types = torch.zeros_like(prompt.input_ids)
        types[prompt.places[0].columns] = 2
        pixels = [
            normalised(patches_of(block, plan, limits, self._device), limits.normal)
            for block in self._frames(plan, limits.temporal_patch_size)
        ]
        pairs, rows, columns = plan.grid
        grid = [[pairs, rows * limits.merge_size, columns * limits.merge_size]]
        inputs = {
            "input_ids": prompt.input_ids[None],
            "attention_mask": torch.ones_like(prompt.input_ids)[None],
            "mm_token_type_ids": types[None],
            "pixel_values_videos": torch.cat(pixels).to(self._dtype),
            "video_grid_thw": torch.tensor(grid, dtype=torch.int64, device="cpu"),
        }
        if vision.tokens_per_second is not None:
            seconds = [plan.sampling.seconds_per_pair(limits.temporal_patch_size)]
            inputs["second_per_grid_ts"] = torch.tensor(seconds, dtype=torch.float32, device="cpu")
        return inputs

    def _frames(self, plan, pair: int) -> Iterator[Any]:
        """Yield blocks of whole frame pairs, uint8 `[n, height, width, 3]`."""
        import numpy as np

        from experiments.speed.first_word_readers import BLOCK, READERS

        times_s = plan.sampling.times_s
        held = []
        for frame in READERS[self._feed](plan.info.path, times_s, plan.sampling.seconds_per_pair(pair) / pair):
            held.append(frame)
            if len(held) == BLOCK // pair * pair:
                yield np.stack(held)
                held = []
        if held:
            yield np.stack(held)


def first_feed() -> str:
    """Import the first available reader in `FEEDS`, and return its name. Raises ImportError if none is available."""
    for module, reader in FEEDS.items():
        try:
            import_module(module)
        except (ImportError, OSError, RuntimeError):  # torchcodec raises RuntimeError if FFmpeg's libraries are missing
            continue
        return reader
    raise ImportError(f"none of {', '.join(FEEDS)} can be imported")


class _Words:
    """A streamer for `generate` that records the time at which each token was generated in `moments`, excluding the prompt."""

    def __init__(self, clock: Callable[[], float], tokenizer, word: Word):
        self.moments: list[float] = []
        self._clock = clock
        self._tokenizer = tokenizer
        self._word = word
        self._prompt_seen = False

    def put(self, ids) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.moments.append(self._clock())
        self._word(self._tokenizer.decode(ids.flatten().tolist()))

    def end(self) -> None:
        pass


def _clock(device) -> Callable[[], float]:
    """Return a function that waits until the device is idle and then returns the time in seconds."""
    from evoprune.backend import Device

    return Device(device).now


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m experiments.speed.first_word_asks", description=__doc__.partition("\n")[0]
    )
    made.add_argument("side", help=f"{TRANSFORMERS}, or a budget of evoprune")
    made.add_argument("-m", "--model", required=True, help="a folder")
    made.add_argument("--device", default="cpu")
    made.add_argument("--once", metavar="FILE", help="ask one question about a video, and print the answer")
    made.add_argument("--frames", type=int, help="default: from the model's rate and limits")
    made.add_argument("-n", "--new-tokens", type=int, default=32)
    return made


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser().parse_args(arguments)
    make = Transformers if args.side == TRANSFORMERS else Ours
    if args.once:
        make(args).ask(args.once, args.frames, args.new_tokens, lambda piece: print(piece, end="", flush=True))
        print()
        return

    def loaded() -> Callable[[dict[str, Any]], dict[str, Any]]:
        side = make(args)
        return lambda asked: (
            side.facts | side.ask(asked["video"], asked["frames"], asked["new_tokens"], lambda piece: None)
        )

    serve(loaded)


if __name__ == "__main__":
    main()
