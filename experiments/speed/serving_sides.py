"""The sides of `experiments.speed.serving`: the command of each server, and what its requests contain."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.speed.serving_client import MODEL
from experiments.speed.serving_inputs import AT_ONCE

STOCK = "stock"
BUILT_IN = ("evs", "vidcom2")  # vLLM's own pruning methods
PLUGIN = "plugin"
SERVE = ("serve", "serve-int8")  # evoprune serve, without and with quantized weights
KV_CACHE_BYTES = 2**28  # several times the keys and values of all requests
# The sizes of the inputs that vLLM processes while it starts. By default, they are the largest that the model supports.
LIMITS = {
    "image": {"count": 1, "width": 512, "height": 512},
    "video": {"count": 1, "num_frames": 20, "width": 256, "height": 256},
}


@dataclass(frozen=True)
class Side:
    """A server, and the fraction of visual tokens that it removes."""

    server: str
    rate: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Side":
        """Parse a name with or without a rate, such as "evs:0.75". Raises ValueError if there is no such side."""
        server, _, rate = text.partition(":")
        if server not in (STOCK, *BUILT_IN, PLUGIN, *SERVE) or (server == STOCK) == bool(rate):
            raise ValueError(f"no side {text!r}")
        return cls(server, float(rate or 0))

    def __str__(self) -> str:
        return self.server if self.server == STOCK else f"{self.server}:{self.rate:g}"

    @property
    def process(self) -> str:
        """The process's name. The plugin and evoprune serve take the rate from each request, so one process serves all rates."""
        return str(self) if self.server in BUILT_IN else self.server

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of each request that OpenAI's protocol doesn't have."""
        share = round(1 - self.rate, 9)
        if self.server in SERVE:
            return {"budget": share}  # has no ignore_eos, but the checkpoint has no end-of-sequence token
        if self.server == PLUGIN:
            return {"ignore_eos": True, "mm_processor_kwargs": {"evoprune_budget": share}}
        return {"ignore_eos": True}

    def command(self, checkpoint: Path, files: Path, fps: int, port: int, threads: int) -> list[str]:
        """Return the server's command. The server may read videos and images from the folder `files`."""
        python = [sys.executable, "-m"]
        if self.server in SERVE:
            quantize = self.server.partition("-")[2] or "none"
            return [
                *python, "evoprune_cli", "serve", "--offline", "-m", str(checkpoint), "--name", MODEL, "--port", str(port),
                "--allow-dir", str(files), "--fps", str(fps), "--dtype", "bf16", "--quantize", quantize,
                "--threads", str(threads), "--timeout", "1h",
            ]  # fmt: skip
        made = [
            *python, "vllm.entrypoints.openai.api_server", "--model", str(checkpoint), "--served-model-name", MODEL,
            "--host", "127.0.0.1", "--port", str(port), "--allowed-local-media-path", str(files), "--dtype", "bfloat16",
            "--enforce-eager", "--block-size", "32", "--max-model-len", "2048", "--max-num-seqs", str(AT_ONCE),
            "--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--limit-mm-per-prompt", json.dumps(LIMITS),
            "--media-io-kwargs", json.dumps({"video": {"num_frames": -1, "fps": fps}}),
        ]  # fmt: skip
        if self.server in BUILT_IN:
            made += ["--video-pruning-rate", str(self.rate), "--video-pruning-method", self.server]
            made += ["--worker-extension-cls", "experiments.speed.serving_cpu.PrunesOnCpu"]
        if self.server == PLUGIN:
            (stock,) = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["architectures"]
            made += ["--hf-overrides", json.dumps({"architectures": [f"EvoPrune{stock}"]})]
            made += ["--video-pruning-rate", str(self.rate), "--trust-request-mm-kwargs"]
        return made
