"""Compare methods by other authors with the units that the authors' public code keeps, given the same tokens.

Each fixture specifies the repository, the commit and the function that was run, and contains the kept units. If the authors' code
returns another number of tokens, or adds noise, `note` says so. If their shares are rounded differently, `counts` contains the
number of tokens per group, which replaces ours. If tokens are means, `sums` contains the sum of each token's channels.

For methods inside the language model, PruneVid's code was given groups of one frame each. SparseVLM's counts do not include the
means that it adds, its noise was removed, and its `sums` contain only the means, in ascending order. ViTCoP's code was given a
cut-off distance per frame pair, and its merged tokens are halved. The code of D2Pruner's authors was not available.
"""

import json
from pathlib import Path

import pytest
import torch

from evoprune import methods
from evoprune.methods import Candidates
from tests.contrib.public import public_layer, public_tokens

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
CASES = [
    pytest.param(case, id=f"{path.stem}-{case['method']}-{case['kind']}-{case['seed']}")
    for path in FIXTURES
    for case in json.loads(path.read_text())["cases"]
]


def tokens_of(case: dict):
    return public_tokens(case["kind"], case["seed"], tuple(case["grid"]))


@pytest.mark.few(50)
@pytest.mark.parametrize("case", [case for case in CASES if "kept" in case.values[0]])
def test_keeps_what_the_public_code_keeps(case, monkeypatch):
    tokens, theirs = tokens_of(case), set(case["kept"])
    method = methods.get(case["method"])
    if "counts" in case:
        counts = iter(case["counts"])
        monkeypatch.setattr(f"{type(method).__module__}.apportion", lambda *_: next(counts))
    made = method.select(tokens, case["keep"])
    ours = set(made.kept.tolist())
    if len(theirs) < case["keep"]:  # before the rest is filled up
        assert theirs <= ours and len(ours) == case["keep"]
    else:
        assert ours == theirs
    if "sums" in case:
        sums = made.features(tokens.features).sum(1)
        torch.testing.assert_close(sums, torch.tensor(case["sums"]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if "into" in case.values[0]])
def test_merges_the_rows_that_the_public_code_merges(case):
    """One round in a single group, with the features as keys."""
    keys = tokens_of(case).features[None]
    place = torch.arange(keys.shape[1])[None]
    group = Candidates(keys, None, place, torch.ones_like(place), torch.ones_like(place, dtype=torch.bool), 8)
    into = methods.get(case["method"]).match(group, torch.tensor([case["remove"]]))
    assert into[0].tolist() == case["into"]


OF_LAYERS = Path(__file__).parent / "fixtures" / "layers" / "language.json"
LAYERS = [
    pytest.param(case, id=f"{case['method']}-{case['kind']}")
    for layer in json.loads(OF_LAYERS.read_text())["layers"]
    for case in layer["cases"]
]


@pytest.mark.parametrize("case", LAYERS)
def test_keeps_what_the_public_code_keeps_of_a_layer(case):
    method, theirs = methods.get(case["method"]), case["kept"]
    tokens = public_layer(case["kind"], case["seed"], tuple(case["grid"]), case["keep"], due=method.exact)
    made = method.select(tokens)
    if theirs is None:
        assert made is None
        return
    ours, sums = made.kept.tolist(), made.features(tokens.hidden).sum(1)
    if method.name == "sparsevlm":
        assert len(ours) == case["keep"] and set(theirs) < set(ours)
        sums = torch.tensor(sorted(float(s) for s, unit in zip(sums, ours, strict=True) if unit not in theirs))
    else:
        assert ours == theirs
    if "sums" in case:
        torch.testing.assert_close(sums, torch.tensor(case["sums"]), atol=2e-3, rtol=0)
