"""Methods of other authors against what their public code keeps of the same tokens.

Each fixture names the repository, the commit and the function that was run, and has the units that it kept. Where their
code ends at another count than a method here can, or draws, the fixture says so in `note`, and `least` is the least
Jaccard similarity of the two kept sets. `sums`, where tokens are means, has the sum of each token's channels.
"""

import json
from pathlib import Path

import pytest
import torch

from evoprune import methods
from evoprune.pruning.types import Candidates
from tests.methods.public_tokens import public_tokens

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("*.json"))
CASES = [
    pytest.param(case, id=f"{path.stem}-{case['method']}-{case['kind']}-{case['seed']}")
    for path in FIXTURES
    for case in json.loads(path.read_text())["cases"]
]


def tokens_of(case: dict):
    return public_tokens(case["kind"], case["seed"], tuple(case["grid"]))


@pytest.mark.parametrize("case", [case for case in CASES if "kept" in case.values[0]])
def test_keeps_what_the_public_code_keeps(case):
    tokens, theirs = tokens_of(case), set(case["kept"])
    made = methods.get(case["method"]).select(tokens, case["keep"])
    ours = set(made.kept.tolist())
    assert len(ours & theirs) / len(ours | theirs) >= case.get("least", 1.0)
    if "sums" in case:
        sums = made.features(tokens.features).sum(1)
        torch.testing.assert_close(sums, torch.tensor(case["sums"]), atol=2e-3, rtol=0)


@pytest.mark.parametrize("case", [case for case in CASES if "into" in case.values[0]])
def test_merges_the_rows_that_the_public_code_merges(case):
    """One round in one group whose keys are the features."""
    keys = tokens_of(case).features[None]
    place = torch.arange(keys.shape[1])[None]
    group = Candidates(keys, None, place, torch.ones_like(place), torch.ones_like(place, dtype=torch.bool), 8)
    into = methods.get(case["method"]).match(group, torch.tensor([case["remove"]]))
    assert into[0].tolist() == case["into"]
