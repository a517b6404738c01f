"""`evoprune:choice=NAME`: others choose among what evoprune encoded."""

import pytest
import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.base import Selection, Tokens
from evoprune.vision.encoder import encode, encode_rows
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

AFTER = [name for name in methods.available() if methods.get(name).acts == "after"]
GRID = (5, 4, 5)


@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("keep", [1, 9, 40])
def test_any_method_after_the_encoder_chooses_among_all_units(name, keep):
    chooser, method = methods.get(name), methods.get("evoprune", {"choice": name, "encoder_budget": "0.2"})
    question = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    args = tiny_tower(), [clip(GRID, changes(GRID, 0.4))], GRID, method, keep
    unchosen, made = encode_rows(*args), encode(*args, question=question)
    assert method.needs_after == chooser.needs_after == set(unchosen.tokens.given)
    assert (method.exact, method.reads_question) == (chooser.exact, chooser.reads_question)
    rows, owner = unchosen.tokens.rows, unchosen.tokens.owner
    assert len(rows) < 100  # and each unit has its row's tokens, attention and keys
    given = {what: value[owner] for what, value in unchosen.tokens.given.items()} | {"question": question}
    every = Tokens(rows[owner], torch.arange(100), GRID, 1.0, 0, given)
    expected = chooser.select(every, keep)
    kept = expected.kept if isinstance(expected, Selection) else expected
    features = expected.features(every.rows) if isinstance(expected, Selection) else every.rows[kept]
    assert torch.equal(made.kept, kept)
    torch.testing.assert_close(made.features, features)
    assert len(made.kept) == keep or not method.exact


@pytest.mark.parametrize("name", ["none", "downscale", "evoprune-paper", "evoprune", "magic", "divprune:speed=1"])
def test_only_a_method_after_the_encoder_can(name):
    with pytest.raises(UsageError):
        methods.get("evoprune", {"choice": name})


def test_it_is_a_setting_like_any_other():
    method = methods.get("evoprune:choice=divprune:encoder_budget=0.5")
    assert (method.choice, method.encoder_budget, method.chooser) == ("divprune", 0.5, methods.get("divprune"))
    assert methods.get("evoprune").chooser == methods.get("evoprune")
