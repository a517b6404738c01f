"""Methods inside the language model against what their authors' code keeps of the same layer; fixtures as in `test_public.py`.

PruneVid's code was given groups of one frame each, SparseVLM's counts without the means that it adds, and no noise. `sums`, where
tokens are means, has the sum of each token's channels; of SparseVLM's means alone, in ascending order. ViTCoP's code was given
the cut-off distance of each frame pair, and its merged tokens are halved. No code of D2Pruner's authors could be had.
"""

import json
from pathlib import Path

import pytest
import torch

from evoprune import methods
from tests.contrib.public_layers import public_layer

FIXTURE = Path(__file__).parent / "fixtures" / "layers" / "language.json"
CASES = [
    pytest.param(case, id=f"{case['method']}-{case['kind']}")
    for layer in json.loads(FIXTURE.read_text())["layers"]
    for case in layer["cases"]
]


@pytest.mark.parametrize("case", CASES)
def test_keeps_what_the_public_code_keeps(case):
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
