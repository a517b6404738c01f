"""Time what a schema or a regular expression costs a token: `python -m experiments.speed.schemas`.

The first table has a vocabulary as large as a real model's, made at random, and no model: what is done once, and what is done for
each token of random answers. The second one has answers of a model, as many tokens each, without a constraint and with each.
"""

import argparse
import time
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np
import tokenizers

from evoprune.language.generate import TokenConstraint
from evoprune.language.guidance import REGEX, SCHEMA, Vocabulary, grammar_of
from evoprune.language.prompt import Tokenizer
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions
from evoprune.video_qa import VideoQA

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
TEXT = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
FIELDS = {
    "type": "object",
    "properties": {
        name: {"type": "array", "minItems": 9, "items": {"enum": [f"{name} {n}" for n in range(50)]}}
        for name in ("colour", "shape", "place", "motion", "time", "count", "digit", "scene", "sound", "speaker")
    },
    "additionalProperties": False,
}
FIELDS["required"] = [*FIELDS["properties"]]
CONSTRAINTS = {  # none of which an answer of a few hundred tokens fulfils
    "a list of texts": (SCHEMA, TEXT),
    "ten lists of words": (SCHEMA, FIELDS),
    "a regular expression": (REGEX, r"([a-z]+ (is|has) [0-9]+[.] ){1000}"),
}


def tokenizer_at_random(size: int) -> Tokenizer:
    """Return a byte-level tokenizer of so many tokens: of bytes, and of tokens joined at random."""
    draw = np.random.default_rng(0)
    known = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    common = [letter for letter in "etaoinshrdlucmfwygpbvk" for _ in range(40)] + known
    vocabulary = {token: number for number, token in enumerate(known)}
    merges = []
    while len(vocabulary) < size:
        pair = tuple(common[number] for number in draw.integers(len(common), size=2))
        joined = "".join(pair)
        if joined not in vocabulary and len(joined) <= 12:
            vocabulary[joined] = len(vocabulary)
            merges.append(pair)
            common.append(joined)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return Tokenizer(backend, "")


def masks(size: int, tokens: int) -> list[str]:
    """Return the rows of the first table, in milliseconds."""
    tokenizer = tokenizer_at_random(size)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    vocabulary, taken_in = timed(partial(Vocabulary, tokenizer, [end]))
    rows = [
        f"| follows ({size:,} tokens, taken in once in {taken_in:.0f} ms) | check, once | begin an answer | a token, median "
        "| 99th percentile | longest |",
        "|---|---|---|---|---|---|",
    ]
    for name, (kind, given) in CONSTRAINTS.items():
        grammar, check = timed(partial(grammar_of, kind, given))
        constraint, begin = timed(partial(vocabulary.constraint, grammar))
        times = sorted(walk(constraint, size + 1, tokens))
        figures = (check, begin, median(times), times[len(times) * 99 // 100], times[-1])
        rows.append(f"| {name} | " + " | ".join(f"{figure:.2f}" for figure in figures) + " |")
    return rows


def walk(constraint: TokenConstraint, size: int, tokens: int) -> list[float]:
    """Return the milliseconds of each token of an answer of tokens that are drawn among those allowed."""
    draw = np.random.default_rng(0)
    times = []
    while len(times) < tokens and not constraint.complete:
        mask, spent = timed(partial(constraint.mask, size))
        token = int(draw.choice(mask.nonzero()[:, 0]))
        times.append(spent + timed(partial(constraint.advance, token))[1])
    return times


def answers(model: str, tokens: int, repeat: int, threads: int) -> list[str]:
    """Return the rows of the second table: milliseconds a token, medians of answers in turn, of which the first does not count."""
    loaded = replace(load_model(ModelOptions(model, threads=threads)), eos_ids=())  # all answers are equally long
    video = VideoQA(loaded, budget=0.25).encode(CLIP, frames=8)
    options = {"nothing": {}} | {name: {kind: given} for name, (kind, given) in CONSTRAINTS.items()}
    spent: dict[str, list[float]] = {name: [] for name in options}
    for _ in range(repeat + 1):
        for name, given in options.items():
            answer = video.ask(QUESTION, max_new_tokens=tokens, **given)
            str(answer)
            spent[name].append(answer.report.time_ms.generate / len(answer.ids))
    rows = [f"| follows ({model}) | ms a token | tokens/s | more than nothing |", "|---|---|---|---|"]
    plain = median(spent["nothing"][1:])
    for name, times in spent.items():
        each = median(times[1:])
        rows.append(f"| {name} | {each:.2f} | {1000 / each:.0f} | {each / plain - 1:+.1%} |")
    return rows


def timed(run):
    """Return what a function returns, and how many milliseconds it took."""
    begin = time.perf_counter()
    made = run()
    return made, 1000 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=151_000, help="tokens of the tokenizer at random")
    given = parser.parse_args()
    for rows in (
        masks(given.vocabulary, given.tokens),  # first: a grammar is checked once
        answers(given.model, given.tokens, given.repeat, given.threads),
    ):
        print("\n".join(rows), end="\n\n")


if __name__ == "__main__":
    main()
