"""`reuse+NAME`: a selector behind reuse in time."""

import pytest
import torch

from evoprune import methods
from evoprune.methods.types import Tokens
from evoprune.vision.encoder import encode_rows
from evoprune.vision.tower import tower_shape
from tests.methods.tokens import AFTER, encoded
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

GRID = (5, 4, 5)


@pytest.mark.few(6)
@pytest.mark.parametrize("name", AFTER)
def test_the_selector_sees_every_unit_with_what_its_row_has(name):
    selector, method = methods.get(name), methods.parse(f"reuse+{name}")
    question = torch.randn(4, 24, generator=torch.Generator().manual_seed(1))
    patches = clip(GRID, changes(GRID, 0.4))
    plan = method.plan(tower_shape(tiny_tower()), GRID, 9)
    tokens = encode_rows(tiny_tower(), [patches], plan).tokens
    assert len(tokens.rows) == changes(GRID, 0.4).sum() < 100
    assert set(tokens.given) == selector.needs
    given = {what: value[tokens.owner] for what, value in tokens.given.items()} | {"question": question}
    every = Tokens(tokens.rows[tokens.owner], torch.arange(100), GRID, given=given)
    for keep in (9, 40):
        made, expected = encoded(method, patches, GRID, keep, question=question), selector.select(every, keep)
        assert torch.equal(made.kept, expected.kept)
        torch.testing.assert_close(made.features, expected.features(every.rows))


def test_it_says_of_itself_what_its_selector_says():
    for name in AFTER:
        selector, method = methods.get(name), methods.parse(f"reuse+{name}")
        assert (method.exact, method.reads_question) == (selector.exact, selector.reads_question)
        assert method.tokens == selector


def test_at_the_full_budget_nothing_is_reused():
    made = encoded(methods.parse("reuse+divprune"), clip(GRID, changes(GRID, 0.0)), GRID, 100)
    assert [rows for _, rows in made.layers] == [100] * 4
