"""Models of transformers that the caller holds, per family: encodings, and sequences of calls that prune."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from transformers import set_seed

import evoprune
from tests.contract.small import Held, encoded, runs, sums
from tests.prompts import CACHE, processed
from tests.tiny import tiny_model

FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
METHODS = ("evoprune", "evoprune-paper", "evoprune-merge", "tome", "visionzip", "reuse+mmr", "cdpruner")
ONE = [(5, ("video", 4, 8, 12), 7)]
TWO = [(5, ("video", 4, 8, 12), 3, ("image", 4, 8), 2, ("video", 2, 4, 8), 7)]
BATCH = [(5, ("video", 4, 8, 12), 7), (3, ("video", 2, 8, 8), 9, ("video", 1, 4, 4), 2), (12,)]
NEW = {"max_new_tokens": 6, "do_sample": False}
# Settings by name, with the families they apply to.
SETTINGS = {
    "budget": ({"budget": 0.25}, FAMILIES),
    "few, Qwen's positions": ({"budget": 0.1, "positions": "qwen"}, ("qwen2_5_vl", "qwen3_vl", "qwen3_5")),
    "merged": ({"budget": 0.25, "method": "evoprune-merge"}, ("qwen2_vl", "qwen3_vl_moe")),
    "pictures": ({"budget": 0.25, "method": "visionzip", "pictures": True}, ("qwen2_5_vl", "qwen3_vl", "qwen3_5_moe")),
}


def held_model(family: str):
    model = tiny_model(family=family)
    model.generation_config.pad_token_id = 398
    return model


def encodes(family: str) -> Held:
    """Encode two videos with the tower, unpruned and pruned by all kinds of methods."""
    model = held_model(family)
    inputs = processed(model, *TWO)
    question = model.get_input_embeddings()(torch.tensor([5, 9, 40, 77])).detach()
    held: Held = {}
    for method in ("none", *METHODS):
        asks = {"question": question} if method == "cdpruner" else {}
        made = evoprune.encode(
            model, inputs["pixel_values_videos"], inputs["video_grid_thw"], method=method, budget=0.25, **asks
        )
        held[method] = encoded(made)
    return held


def calls(family: str, settings: dict) -> Held:
    """Call a model that prunes several times: alone, as a batch, with beams, with sampling, in a conversation."""
    model, held = held_model(family), {}
    with evoprune.EvoPrune(**settings)(model) as run, torch.no_grad():
        held["two"] = called(model, processed(model, *TWO))
        held["two columns"] = columns_of(run)
        for side in ("left", "right"):
            batch = processed(model, *BATCH, side=side)
            held[f"batch {side}"] = called(model, batch)
            held[f"batch {side} columns"] = columns_of(run)
        held["text"] = called(model, processed(model, (9,)))
        one = processed(model, *ONE)
        held["beams"] = generated(model, one, num_beams=3, num_return_sequences=2)
        set_seed(3)
        held["drawn"] = generated(model, one, do_sample=True, temperature=0.9, top_p=0.9, num_return_sequences=2)
        held["conversation"] = conversation(model, one)
        held["one again"] = called(model, one)
        report = run.report
    held["rows"] = [list(each) for each in report.pruning.layers]
    held["tokens"] = [report.tokens.text, report.tokens.visual, report.tokens.prompt]
    return held


def called(model, inputs: dict) -> Held:
    """Return the generated ids, and sums of the logits of the remaining columns."""
    logits = model(**inputs).logits
    shape = list(logits.shape)
    return {"ids": generated(model, inputs), "logits": [shape, sums(logits[:, -1]), sums(logits.flatten(0, 1)[:7])]}


def generated(model, inputs: dict, **settings) -> list[list[int]]:
    made = model.generate(**inputs, **NEW | settings)
    return made[:, inputs["input_ids"].shape[1] :].tolist()


def conversation(model, inputs: dict) -> list[list[int]]:
    """Ask a second question on the cache of the first."""
    first = model.generate(**inputs, **NEW, return_dict_in_generate=True)
    ids = torch.cat([first.sequences, torch.arange(10, 16)[None]], 1)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return generated(model, text, **{CACHE: first[CACHE]})


def columns_of(run) -> list[str]:
    """Return the remaining columns per prompt; -1 is padding."""
    return [runs(row) for row in run.columns.index.tolist()]


def cases() -> Iterator[tuple[str, Callable[[], Held]]]:
    for family in FAMILIES:
        yield f"held {family} encodes", partial(encodes, family)
        for name, (settings, families) in SETTINGS.items():
            if family in families:
                yield f"held {family} {name}", partial(calls, family, settings)
