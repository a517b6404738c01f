"""Faults that are planted one at a time, by replacing one expression of a function."""

import inspect
import sys
from dataclasses import dataclass
from textwrap import dedent

import pytest


@dataclass(frozen=True)
class Fault:
    """A fault to plant in the code, which one of the checks must then detect.

    Attributes:
        found_by: the check that must find the fault.
        of: "module:function" or "module:Class.method", in the module that calls it.
        old: the expression to replace, which occurs only once in the function.
        new: its replacement.
    """

    found_by: str
    of: str
    old: str
    new: str

    def plant(self, monkeypatch: pytest.MonkeyPatch) -> None:
        module, _, name = self.of.partition(":")
        owner = __import__(module, fromlist=["_"])
        *classes, name = name.split(".")
        for each in classes:
            owner = getattr(owner, each)
        source = dedent(inspect.getsource(inspect.unwrap(getattr(owner, name))))
        assert source.count(self.old) == 1, source
        known = vars(sys.modules[inspect.unwrap(getattr(owner, name)).__module__]).copy()
        exec(compile(source.replace(self.old, self.new), f"<{self.of}>", "exec"), known)
        monkeypatch.setattr(owner, name, known[name])


TOWER, DECODER, ENCODER = "evoprune.vision.tower", "evoprune.language.decoder", "evoprune.vision.encoder"
FAULTS = {
    "a tensor that is loaded upside down": Fault(
        "weights",
        "evoprune.session.loading.model:load_weights",
        "tensors[name] = weight\n",
        "tensors[name] = weight.flip(0)\n",
    ),
    "another rotary base in the tower": Fault("tower", f"{TOWER}:rotary", "10000.0", "1000.0"),
    "another rotary base in the language model": Fault(
        "logits", "evoprune.language.decoder:_frequencies", "/ theta **", "/ (theta / 2) **"
    ),
    "columns off by one": Fault(
        "positions", "evoprune.language.prompt:video_positions", 'arange_on(w, "cpu")', 'arange_on(w, "cpu") + 1'
    ),
    "text behind a video off by one": Fault(
        "positions", "evoprune.session.loading.model:prompt_positions", "int(inside.max()) + 1", "int(inside.max()) + 2"
    ),
    "the bias of keys and queries left out": Fault(
        "tower",
        f"{TOWER}:Layer.queries_keys_values",
        "linear(self.weights.attn.qkv, normed)",
        "F.linear(normed, self.weights.attn.qkv.weight)",
    ),
    "a norm of the tower scaled": Fault(
        "tower", f"{TOWER}:Layer.mlp", "self.weights.norm2, x)", "self.weights.norm2, x) * 1.02"
    ),
    "a norm of the language model scaled": Fault("logits", f"{DECODER}:norm", "* weight", "* (weight * 1.02)"),
    "a tower that is not pruned": Fault(
        "counts",
        f"{ENCODER}:EncoderRun.select_rows",
        "max_rows = stage.rows\n",
        "max_rows = len(rows)\n",
    ),
    "decoded tokens at a wrong position": Fault(
        "answer",
        "evoprune.language.generate:PrefillState.read",
        "self.next_position + len(self.answer)",
        "self.next_position - len(self.answer)",
    ),
}
# Faults that only Qwen3-VL can have.
QWEN3_FAULTS = {
    "features of another inner layer": Fault(
        "tower",
        f"{ENCODER}:EncoderRun.after_layer",
        "merge_patches(self.visual, piece, number)",
        "merge_patches(self.visual, piece, 0)",
    ),
    "features of inner layers left out": Fault(
        "logits", f"{DECODER}:forward", "x + deepstack[0, -len(x) :]", "x + 0 * deepstack[0, -len(x) :]"
    ),
    "learned positions of another frame": Fault(
        "tower",
        "evoprune.vision.families:learned_positions",
        "2 * geo.width)",
        "2 * geo.width + 2)[: 2 * geo.width]",
    ),
    "axes of positions in another order": Fault(
        "logits", f"{DECODER}:frequencies_of", 'bool(rope.get("mrope_interleaved"))', "False"
    ),
}
