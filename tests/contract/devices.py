"""The ways of a GPU, in processes of their own: `python -m tests.contract.devices NAME` prints what is held, as JSON.

far      the second device of tests/second_device, whose tensors the CPU cannot read
triton   on a CPU that takes the ways of a GPU, with the kernels of Triton, which its interpreter runs
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
TOKENS = {"far": 12, "triton": 3}  # that are drawn; a graph is captured after some
FRAMES = {"far": 12, "triton": 4}  # where each operation takes long there are few


def apart(name: str) -> dict:
    """What `main` prints, run in a process of its own."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": os.path.abspath("out")}
    command = [sys.executable, "-m", "tests.contract.devices", name]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout)


def asked(qa, given, tokens: int) -> dict:
    """An encode, and a question about it: what is kept, the logits of given tokens, and tokens that are drawn."""
    from tests.contract.small import encoded, sums

    video = qa.encode(given, frame_rate=2)
    held = encoded(video.encoded)
    logits, _ = video.read_along(QUESTION, GIVEN)
    drawn = video.ask(QUESTION, max_new_tokens=tokens, **DRAWN)
    return held | {"drawn": drawn.text, "ids": drawn.ids, "logits": sums(logits)}


def everything(name: str, device: str) -> dict:
    """The demo model on two clips, and tiny models of other families."""
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
    """A context in which steps of decoding are recorded once, and run again, as by a graph of CUDA."""
    from unittest.mock import patch

    from evoprune.language import static
    from tests.backend.recorder import Graphs

    with patch.object(static, "devices", Graphs()), patch.object(static, "can_step", lambda model: True):
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
