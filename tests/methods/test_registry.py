import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.base import Candidates, Method, Tokens
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.pruning.schedule import TowerShape

TOWER = TowerShape(8, (1, 3, 5, 7))


def test_the_registry_lists_what_it_can_get():
    names = methods.available()
    assert {"evoprune", "evoprune-paper", "none", "random"} <= set(names)
    assert methods.DEFAULT in names and len(set(names)) == len(names)
    for name in names:
        method = methods.get(name)
        assert isinstance(method, Method)
        assert method.acts in ("none", "input", "inside", "after")
        assert type(method).__doc__
        assert method == methods.get(name, {})


@pytest.mark.parametrize("name", ["none", "random", "evoprune-paper"])
def test_a_method_knows_the_name_it_is_selected_by(name):
    assert methods.get(name).name == name


@pytest.mark.parametrize("name", methods.available())
def test_settings_survive_the_way_through_texts(name):
    method = methods.get(name)
    texts = {field.name: str(getattr(method, field.name)) for field in fields(method)}
    assert methods.get(name, texts) == method


def test_settings_are_parsed_by_their_type():
    texts = {"first": "0.25", "neighbours": "7", "size_bias": "false", "split": "checkerboard", "diversity": "-1"}
    method = methods.get("evoprune-paper", texts)
    assert method == EvoPrunePaper(first=0.25, neighbours=7, size_bias=False, split="checkerboard", diversity=-1.0)
    for text, value in (("TRUE", True), ("1", True), ("0", False), ("False", False)):
        assert methods.get("evoprune-paper", {"size_bias": text}).size_bias is value


@pytest.mark.parametrize("name", ["", "EvoPrune", "magic", "evoprune_paper"])
def test_an_unknown_method_is_refused_with_those_there_are(name):
    with pytest.raises(UsageError) as caught:
        methods.get(name)
    assert repr(name) in caught.value.message
    assert all(known in caught.value.hint for known in methods.available())


@pytest.mark.parametrize(("name", "argument"), [("evoprune-paper", "ratio"), ("random", "seed"), ("none", "name")])
def test_an_unknown_argument_is_refused_with_those_there_are(name, argument):
    with pytest.raises(UsageError) as caught:
        methods.get(name, {argument: "1"})
    assert repr(argument) in caught.value.message and name in caught.value.message
    for field in fields(methods.get(name)):
        assert f"{field.name}={field.default}" in caught.value.hint
    assert caught.value.hint


BAD_VALUES = [
    ("first", "a"),
    ("first", ""),
    ("first", "nan"),
    ("first", "0.7"),
    ("last", "1.5"),
    ("neighbours", "2.5"),
    ("neighbours", "0"),
    ("size_bias", "yes"),
    ("critical", "1.1"),
    ("critical", "nan"),
    ("allocation", "even"),
    ("features", "values"),
    ("split", "rows"),
    ("survivor", "both"),
]


@pytest.mark.parametrize(("argument", "text"), BAD_VALUES)
def test_a_bad_value_is_refused(argument, text):
    with pytest.raises(UsageError) as caught:
        methods.get("evoprune-paper", {argument: text})
    assert "evoprune-paper" in caught.value.message
    assert argument in caught.value.message or caught.value.message.count("schedule")


@pytest.mark.parametrize(("argument", "text"), BAD_VALUES)
def test_and_the_user_is_told_what_would_be_good(argument, text):
    with pytest.raises(UsageError) as caught:
        methods.get("evoprune-paper", {argument: text})
    assert caught.value.hint


@pytest.mark.parametrize("argument", ["diversity", "attention"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf"])
def test_weights_are_finite(argument, text):
    # A score that is not a finite number ranks nothing.
    with pytest.raises(UsageError):
        methods.get("evoprune-paper", {argument: text})


def test_the_base_keeps_everything():
    method = methods.get("none")
    assert method.acts == "none" and not method.needs
    assert method.rows(TOWER, 30, 4, 3) == [30] * 8
    with pytest.raises(TypeError, match="none does not merge"):
        method.match(None, torch.tensor([1]))
    with pytest.raises(TypeError, match="none does not select"):
        method.select(Tokens(torch.zeros(1, 1), torch.zeros(1), (1, 1, 1), 1.0, 0), 1)


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, {"keys"}),
        ({"features": "hidden"}, {"hidden"}),
        ({"features": "hidden", "attention": 0.1}, {"hidden", "attention"}),
        ({"critical": 0.1}, {"keys", "attention"}),
        ({"survivor": "attended"}, {"keys", "attention"}),
    ],
)
def test_the_papers_method_asks_for_no_more_than_it_uses(settings, needs):
    assert EvoPrunePaper(**settings).needs == needs


def candidates(n, attention, seed=0):
    features = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(1, n, dtype=torch.int64)
    return Candidates(features, torch.tensor([attention]), torch.arange(n)[None], ones * 0, ones, ones.bool(), n)


@pytest.mark.parametrize("survivor", ["destination", "attended"])
def test_critical_rows_are_the_most_attended_and_the_last_to_be_absorbed(survivor):
    attention = [0.1, 0.9, 0.1, 0.2, 0.1, 0.8, 0.1, 0.1]  # 1 and 5 are sources
    method = EvoPrunePaper(critical=0.25, attention=0.0, diversity=0.0, survivor=survivor)
    into = method.match(candidates(8, attention), torch.tensor([2]))[0].tolist()
    assert into[1] == 1 and into[5] == 5  # the other two sources went first
    everything = method.match(candidates(8, attention), torch.tensor([4]))[0].tolist()
    assert sum(i != at for at, i in enumerate(everything)) == 4
    assert (everything[1] == 1 and everything[5] == 5) == (survivor == "attended")


@pytest.mark.parametrize(
    ("share", "n", "critical"), [(0.1, 1, 1), (0.1, 10, 1), (0.1, 11, 2), (0.5, 5, 3), (0.15, 100, 15), (1.0, 4, 4)]
)
def test_the_critical_share_is_rounded_up(share, n, critical):
    attention = [1.0 - i / 1000 for i in range(n)]  # so the critical rows are the first ones
    group = candidates(n, attention)
    group.features[0, :critical] = group.features[0, 0]  # and go most gladly, if they are not held back
    method = EvoPrunePaper(critical=share, attention=0.0, diversity=0.0)
    free = [i for i in range(critical, n) if i % 2]  # sources that may go
    into = method.match(group, torch.tensor([len(free)]))[0].tolist()
    assert [i for i in range(n) if into[i] != i] == free


def test_listing_methods_and_counting_tokens_needs_no_torch():
    code = (
        "import sys, evoprune.methods, evoprune.pruning.budget, evoprune.pruning.schedule\n"
        "evoprune.methods.available()\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_name_may_bring_settings():
    plain, variant = methods.get("evoprune-paper"), methods.get("evoprune-paper:critical=0.2:allocation=mean")
    assert (variant.critical, variant.allocation) == (0.2, "mean") and plain != variant
    assert methods.get("evoprune-paper:critical=0.2", {"critical": "0.3", "block": "2"}).critical == 0.2
    assert methods.known("random") and methods.known("evoprune-paper:nonsense") and not methods.known("randomly:a=1")
    for name in ("evoprune-paper:critical", "evoprune-paper:ratio=1", "evoprune-paper:critical=x", "evoprune-paper:"):
        with pytest.raises(UsageError):
            methods.get(name)


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("reuse", "-1"), ("reuse", "nan"), ("encoder_budget", "0"), ("encoder_budget", "1.1"),
        ("encoder_budget", "nan"), ("encoder_budget", "x"), ("alpha", "-1"),
        ("alpha", "nan"), ("alpha", "inf"), ("size_bias", "false"),
    ],
)  # fmt: skip
def test_a_setting_of_evoprune_that_makes_no_sense_is_refused(argument, text):
    with pytest.raises(UsageError) as caught:
        methods.get("evoprune", {argument: text})
    assert argument in caught.value.message and caught.value.hint


def test_without_references_evoprune_may_do_without_the_bias():
    assert not methods.get("evoprune", {"size_bias": "false", "reuse": "0"}).size_bias


def test_a_budget_of_the_encoders_own_is_a_setting():
    plain, own = methods.get("evoprune"), methods.get("evoprune", {"encoder_budget": "0.4"})
    assert (plain.encoder_budget, own.encoder_budget) == (None, 0.4) and methods.get(
        "evoprune:encoder_budget=0.4"
    ) == own
    for budget in (0.1, 0.25, 0.5, 1.0):  # it follows the other one, unless it is set
        assert plain.encoder_share(budget) == budget and own.encoder_share(budget) == 0.4


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("evoprune", 0.1), ("evoprune:merge=0.5", 0.1), ("evoprune:encoder_budget=0.3", 0.3), ("evoprune:depth=1", 1.0),
        ("evoprune:depth=1:merge=0.5", 0.5), ("evoprune:choice=divprune", 1.0), ("evoprune:choice=divprune:merge=0.05", 0.1),
        ("evoprune:choice=divprune:encoder_budget=0.2", 0.2),
    ],
)  # fmt: skip
def test_the_encoders_share_is_what_is_left_of_its_rows(name, share):
    assert methods.get(name).encoder_share(0.1) == share


def test_rows_merge_before_they_are_chosen():
    with pytest.raises(UsageError, match="last is at most depth"):
        methods.get("evoprune:merge=0.5:last=0.5")
    assert methods.get("evoprune:merge=0.5:last=0.5:depth=1").merge == 0.5


def test_how_many_rows_may_be_left_after_merging():
    allowed = {
        "evoprune": (96, 96),
        "evoprune:merge=0.5": (48, 96),  # where as many go on nothing merges
        "evoprune:merge=0.8": (77, 77),
        "evoprune:merge=0.5:encoder_budget=0.7": (96, 96),
        "evoprune:merge=0.5:encoder_budget=0.1": (48, 48),
        "evoprune:merge=0.5:depth=1": (48, 72),
        "evoprune:merge=0.5:choice=divprune": (48, 72),
        "evoprune:depth=1:encoder_budget=0.1": (10, 10),  # nothing is chosen inside the tower: it is all that is left
        "evoprune:choice=divprune:encoder_budget=0.1": (10, 10),
        "evoprune:merge=0.5:encoder_budget=1": (96, 96),
        "evoprune:depth=1:encoder_budget=0.001": (1, 1),
    }
    for name, counts in allowed.items():
        assert tuple(methods.get(name).allowance(96, due) for due in (24, 72)) == counts, name


@pytest.mark.parametrize("name", ["evoprune:choice=divprune", "evoprune:depth=1", "evoprune:encoder_budget=1"])
def test_where_nothing_is_chosen_inside_the_tower(name):
    assert methods.get(name).narrows_after(TOWER, 0.25) is None


@pytest.mark.parametrize(("depth", "layers"), [(0.25, 2), (0.125, 1), (0.01, 1), (0.5, 4), (0.99, 7)])
def test_after_how_many_layers_rows_are_chosen(depth, layers):
    assert methods.get(f"evoprune:depth={depth}").narrows_after(TOWER, 0.25) == layers


@pytest.mark.parametrize("name", sorted({*methods.available()} - {"evoprune"}))
def test_other_methods_have_none_and_refuse_it(name):
    assert methods.get(name).encoder_budget is None and methods.get(name).encoder_share(0.5) is None
    with pytest.raises(UsageError) as caught:
        methods.get(name, {"encoder_budget": "0.4"})
    assert caught.value.message == f"method {name} has no encoder budget" and "--method evoprune" in caught.value.hint


def test_what_prunes_at_which_budget():
    for name in methods.available():
        assert methods.get(name).prunes(0.99) == (name != "none") and not methods.get(name).prunes(1.0)
    assert methods.get("evoprune:encoder_budget=1").prunes(1.0)
