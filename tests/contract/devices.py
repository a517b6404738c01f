"""Run the code paths of a GPU in separate processes: `python -m tests.contract.devices NAME` prints the recorded values as JSON.

far      the second device of tests/second_device, whose tensors the CPU cannot read
triton   a CPU that takes the code paths of a GPU, with Triton's kernels in its interpreter
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from tests.contract.running import ROOT

SETTINGS = (("none", 1.0), ("evoprune", 0.25), ("evoprune", 0.1), ("evoprune-paper", 0.25), ("tome", 0.25))
QUESTION, GIVEN = "What colour is the square?", [26, 381, 27]
DRAWN = {"temperature": 1.5, "seed": 2}
TOKENS = {"far": 12, "triton": 3}  # tokens to sample; a graph is captured after some of them
FRAMES = {"far": 12, "triton": 4}  # few if every operation is slow


def apart(name: str) -> dict:
    """Return the output of `main`, run in a separate process."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": os.path.abspath("out")}
    command = [sys.executable, "-m", "tests.contract.devices", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def asked(qa, given, tokens: int) -> dict:
    """Encode, ask a question, and return the kept units, the logits of given tokens, and sampled tokens."""
    from tests.contract.small import encoded, sums

    video = qa.encode(given, frame_rate=2)
    held = encoded(video.encoded)
    logits, _ = video.read_along(QUESTION, GIVEN)
    drawn = video.ask(QUESTION, max_new_tokens=tokens, **DRAWN)
    return held | {"drawn": drawn.text, "ids": drawn.ids, "logits": sums(logits)}


def everything(name: str, device: str) -> dict:
    """Return the results of the demo model on two clips, and of tiny models of other families."""
    import evoprune
    from tests.contract.small import moving, still
    from tests.tiny import save_tiny

    held = {}
    load = partial(evoprune.VideoQA.load, device=device, dtype="fp32")
    model, frames, tokens = load("demo").loaded, FRAMES[name], TOKENS[name]
    for kind, clip in {"still": still(frames), "moving": moving(frames)}.items():
        for method, budget in SETTINGS if kind == "still" or name == "far" else SETTINGS[1:2]:
            qa = evoprune.VideoQA(model, method=method, budget=budget)
            held[f"{kind} {method} {budget}"] = asked(qa, clip, tokens)
    for family in ("qwen2_5_vl", "qwen3_vl", "qwen3_5"):
        with tempfile.TemporaryDirectory() as folder:
            qa = load(str(save_tiny(folder, family=family)), budget=0.25)
            held[family] = asked(qa, still(4), tokens)
    return held


@contextmanager
def recorded_graphs() -> Iterator[None]:
    """Record decoding steps once and replay them, as a CUDA graph would."""
    from unittest.mock import patch

    from evoprune.backend import Device
    from evoprune.language import static
    from tests.backend.recorder import Graphs

    with patch.object(Device, "capture", Graphs().capture), patch.object(static, "can_step", lambda model: True):
        yield


def main(name: str) -> None:
    if name == "far":
        from tests.second_device import far, plugin  # noqa: F401  before anything of evoprune

        device, ways = far.NAME, recorded_graphs()
    else:
        from tests.backend.gpu_ways import gpu_ways

        device, ways = "cpu", gpu_ways()
    import torch

    torch.set_num_threads(1)
    with ways:
        made = everything(name, device)
    json.dump(made, sys.stdout)


def cases() -> Iterator[tuple[str, Callable[[], dict]]]:
    yield "second device", partial(apart, "far")
    yield "kernels of Triton", partial(apart, "triton")


if __name__ == "__main__":
    main(*sys.argv[1:])
