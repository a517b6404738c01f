"""Faults that are planted one at a time: one expression of a function is replaced."""

import inspect
import sys
from dataclasses import dataclass
from textwrap import dedent

import pytest


@dataclass(frozen=True)
class Fault:
    """Attributes:
    found_by: the check that must find it.
    of: "module:function" or "module:Class.method", where it is called.
    old, new: the expression, which occurs once, and what is put in its place.
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
        "positions", "evoprune.session.prompting:prompt_positions", "int(inside.max()) + 1", "int(inside.max()) + 2"
    ),
    "the bias of keys and queries left out": Fault(
        "tower",
        f"{TOWER}:Layer.queries_keys_values",
        "linear(self.weights.attn.qkv, normed)",
        "F.linear(normed, self.weights.attn.qkv.weight)",
    ),
    "the bias of cluster sizes left out": Fault("model", f"{DECODER}:_bias", "sizes.log()", "sizes.log() * 0"),
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
    "units that reuse the row of their neighbour": Fault(
        "reuse",
        f"{ENCODER}:reused_units",
        "* geo.units + place]",
        "* geo.units + place.roll(1)]",
    ),
    "pixels too bright": Fault(
        "patches", "evoprune.hf.processor_inputs:normalised", "_by_channel(std", "0.98 * _by_channel(std"
    ),
    "decoded tokens at a wrong position": Fault(
        "answer",
        "evoprune.language.generate:PrefillState.read",
        "self.next_position + len(self.answer)",
        "self.next_position - len(self.answer)",
    ),
    "every input reads the tokens of the last": Fault(
        "inputs",
        "evoprune.session.asking:prune_prompt",
        "*(tokens.features.to(words) for tokens in read)",
        "*(read[-1].features[: len(tokens.features)].to(words) for tokens in read)",
    ),
    "a word of the question before that stays": Fault(
        "again", "evoprune.language.prefix:PrefixCache._take", "cache.crop(known)", "cache.crop(known + 1)"
    ),
    "the rows of a piece in another order": Fault(
        "chunks", f"{TOWER}:in_pieces", "len(values)] = values", "len(values)] = values.roll(1, 0)"
    ),
    "one wait for each norm": Fault(
        "waits", "evoprune.vision.families:norm", ".mul_(weight)", ".mul_(weight + 0 * weight.sum().item())"
    ),
    "an estimate that leaves the work out": Fault(
        "memory",
        "evoprune.bench.verify.checks:encoding_bytes",
        "return working_memory",
        "return 0 * working_memory",
    ),
    "packed layers without their bias": Fault(
        "packed",
        "evoprune.backend.cpu.linear:PackedLinear.forward",
        "self.weights_for(x), self.bias",
        "self.weights_for(x), None",
    ),
    "attention to padding": Fault(
        "batch",
        "evoprune.hf.context:without_pruned",
        '["attention_mask"] = columns.take(used)',
        '["attention_mask"] = torch.ones_like(columns.take(used))',
    ),
    "a selection that depends on threads": Fault(
        "threads",
        "evoprune.methods.evoprune:farthest_points",
        "radii.long()",
        "radii.roll(torch.get_num_threads()).long()",
    ),
    "scales of 8 bits too small": Fault("int8", "evoprune.backend.cpu.quantize:int8_weights", "/ 127)", "/ 200)"),
    "zeros of 4 bits off by one": Fault("int4", "evoprune.backend.cpu.quantize:_int4_piece", ".add_(8)", ".add_(9)"),
    "a method that selects one token too few": Fault(
        "methods",
        "evoprune.methods.baselines:DivPrune.select",
        "(tokens.features, keep)",
        "(tokens.features, keep - 1)",
    ),
}
# Of what Qwen3-VL alone has.
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
