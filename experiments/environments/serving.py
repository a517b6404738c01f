"""Time encode and first token inside vLLM: its own encoder, its own pruning (EVS), and the plugin, in turn; then 16 requests.

    python -m experiments.environments.serving CKPT -o runs/serving.md      # CKPT is written if it is not there
    python -m experiments.environments.serving CKPT --of Qwen/Qwen3.5-4B    # of another model's dimensions
    python -m experiments.environments.serving --tiny --rounds 1            # the demo model: does it run? Its times mean nothing

CKPT has a vision tower of a model's dimensions, by default the 3B model's, a language model of its width with few layers, and
random weights (2 GB). Heads of Qwen3.5 have no room for the bias of cluster sizes, so it is pruned without (`evoprune:count=0`).
Each side is a process of its own, which waits while another one works. EVS fails on a CPU, because vLLM's runner does not note
there that the model prunes; the process of that side sets the flag. Run it in the environment of docs/serving.md.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from evoprune.bundled import DEMOS
from evoprune.model.config import parse_config
from evoprune.session.loading.hub import BUNDLED_CONFIGS
from evoprune_vllm import PREFIX

SIDES = ("stock", "evoprune:0", "evs:0.75", "evoprune:0.75", "evs:0.9", "evoprune:0.9")
MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
FRAMES, HEIGHT, WIDTH, FPS = 16, 252, 448, 2  # of the clip
# requests, and tokens of each of their answers
AT_ONCE = 16
NEW = 16
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>"
    "What happens?<|im_end|>\n<|im_start|>assistant\n"
)


def write_checkpoint(folder: Path, name: str, layers: int) -> None:
    """Random weights with the demo's tokenizer: a model's tower, and `layers` layers of its language model."""
    import shutil

    import torch
    from safetensors.torch import save_file

    from evoprune.session.loading.hosted import random_hosted
    from evoprune.session.loading.model import random_model

    config, demo = (
        json.loads(path.read_text("utf-8")) for path in (BUNDLED_CONFIGS[name], DEMOS["demo"].folder / "config.json")
    )
    config |= {key: value for key, value in demo.items() if key.endswith("_token_id")}
    text = {key: value for key, value in config["text_config"].items() if not key.endswith("_token_id")}
    text |= {"num_hidden_layers": layers, "vocab_size": demo["text_config"]["vocab_size"]}
    text["layer_types"] = text.get("layer_types", ["full_attention"] * layers)[:layers]
    config["text_config"] = text
    made = folder.with_name(folder.name + ".writing")
    shutil.copytree(DEMOS["demo"].folder, made, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    parsed = parse_config(config)
    make = random_model if parsed.vision_config.traits.native else random_hosted
    model = make(parsed, torch.bfloat16, torch.device("cpu"))
    save_file(dict(model.named_parameters()), made / "model.safetensors", metadata={"format": "pt"})
    (made / "config.json").write_text(json.dumps(config), encoding="utf-8")
    area = {"shortest_edge": 12_544, "longest_edge": FRAMES * HEIGHT * WIDTH}
    more = {"size": area, "patch_size": config["vision_config"]["patch_size"]}
    for file in ("preprocessor_config.json", "video_preprocessor_config.json"):
        path = made / file
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | more), encoding="utf-8")
    made.rename(folder)


class Engine:
    """vLLM in this process, as one of the sides."""

    def __init__(self, side: str, model: str, dtype: str):
        from vllm import LLM

        name, _, rate = side.partition(":")
        pruned = {"video_pruning_rate": float(rate)} if float(rate or 0) else {}
        (stock,) = json.loads((Path(model) / "config.json").read_text("utf-8"))["architectures"]
        override = {"hf_overrides": {"architectures": [PREFIX + stock]}} if name == "evoprune" else {}
        if "Qwen3_5" in stock:
            override["additional_config"] = {"evoprune": {"method": "evoprune:count=0"}}
        fixed = {"enforce_eager": True, "block_size": 32, "max_model_len": 4096, "max_num_seqs": AT_ONCE, "seed": 0}
        nothing_cached = {"enable_prefix_caching": False, "mm_processor_cache_gb": 0}
        self.llm = LLM(model=model, dtype=dtype, **fixed, **nothing_cached, **pruned, **override)
        runner = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner
        if name == "evs":
            runner.is_multimodal_pruning_enabled = True
        self._encode = runner.model.embed_multimodal
        self._spent = 0.0
        runner.model.embed_multimodal = self._timed

    def _timed(self, **inputs):
        start = time.perf_counter()
        made = self._encode(**inputs)
        self._spent += time.perf_counter() - start
        return made

    def run(self, seeds: list[int], tokens: int) -> dict:
        """Answers a request for each seed, each about another clip, all at once."""
        from vllm import SamplingParams

        how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        requests = [{"prompt": PROMPT, "multi_modal_data": {"video": [clip(seed)]}} for seed in seeds]
        self._spent = 0.0
        start = time.perf_counter()
        outputs = self.llm.generate(requests, how, use_tqdm=False)
        wall = time.perf_counter() - start
        prompt = sum(len(output.prompt_token_ids) for output in outputs) // len(outputs)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"encode": self._spent, "wall": wall, "prompt": prompt, "peak": peak}


def clip(seed: int):
    """Ordinary motion, another clip for each seed, with what vLLM wants to know of it."""
    import numpy as np

    from evoprune.bench import clips

    frames = np.roll(clips.synthetic_clip("motion", FRAMES, HEIGHT, WIDTH), 28 * seed, 2)
    metadata = {"fps": float(FPS), "duration": FRAMES / FPS, "total_num_frames": FRAMES, "do_sample_frames": False}
    return frames, metadata | {"frames_indices": list(range(FRAMES))}


class Side:
    """The process of a side."""

    def __init__(self, name: str, model: str, dtype: str):
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
        command = [sys.executable, "-m", "experiments.environments.serving", "--side", name, model, "--dtype", dtype]
        self.name = name
        self.results = []
        self._process = subprocess.Popen(  # noqa: S603 (this Python)
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment | dict(os.environ)
        )

    def run(self, seeds: list[int], tokens: int) -> dict:
        """As `Engine.run`, in the other process.

        Raises:
            RuntimeError: it ended.
        """
        print(json.dumps([seeds, tokens]), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("{"):  # vLLM writes to stdout as well
                return json.loads(line)
        raise RuntimeError(f"{self.name} ended with {self._process.wait()}")

    def end(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def serve(side: str, model: str, dtype: str) -> None:
    """The other end of `Side`: a line of JSON for each line of JSON."""
    engine = Engine(side, model, dtype)
    for line in sys.stdin:
        print(json.dumps(engine.run(*json.loads(line))), flush=True)


def measure(names: list[str], model: str, dtype: str, rounds: int) -> list[str]:
    """Return the rows of the table. The sides take turns, after one request each that is not counted."""
    sides = [Side(name, model, dtype) for name in names]
    for side in sides:
        side.run([rounds], 1)
    for seed in range(rounds):
        for side in sides:
            side.results.append(side.run([seed], 1))
    together = {side.name: side.run(list(range(AT_ONCE)), NEW) for side in sides}
    for side in sides:
        side.end()
    first = sides[0].results
    rows = []
    for side in sides:
        encode, wall = (median(each[key] for each in side.results) for key in ("encode", "wall"))
        faster, sooner = (
            median(a[key] / b[key] for a, b in zip(first, side.results, strict=True)) for key in ("encode", "wall")
        )
        all_at_once = together[side.name]
        cells = (
            side.name,
            f"{side.results[0]['prompt']:,}",
            f"{encode:.2f}",
            f"{faster:.2f}",
            f"{wall:.2f}",
            f"{sooner:.2f}",
            f"{AT_ONCE / all_at_once['wall']:.2g}",
            f"{all_at_once['peak'] / 2**30:.2f}",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Parses the command line; prints the table, and writes it if a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--of", default=MODEL, help="whose dimensions CKPT gets, if it is not there")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("-o", type=Path)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        return serve(given.side, str(given.model), given.dtype)
    model = DEMOS["demo"].folder if given.tiny else given.model
    if model is None:
        parser.error("name a checkpoint, or give --tiny")
    if not model.exists():
        write_checkpoint(model, given.of, given.layers)
    rows = measure(given.sides.split(","), str(model), given.dtype, given.rounds)
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    table = "\n".join(
        [
            f"{FRAMES} frames of {HEIGHT}x{WIDTH}, {given.dtype}, threads: {threads}; medians of {given.rounds} rounds in turn",
            "",
            "| side | tokens of the prompt | encode, s | times as fast | first token, s | times as fast "
            f"| {AT_ONCE} at once, requests/s | peak memory, GiB |",
            "|---|---|---|---|---|---|---|---|",
            *rows,
        ]
    )
    print(table)
    if given.o:
        given.o.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
