"""The settings of a server: which methods and budgets it takes."""

import pytest

from evoprune.errors import UsageError
from evoprune.integrations.vllm.settings import method_of, request_budget, served_budget, without_own


def test_the_method_is_the_one_of_the_configuration():
    assert method_of({}).name == "evoprune"
    assert method_of({"evoprune": {"method": "evoprune:count=0"}}).encoder.count == 0
    assert method_of({"evoprune": {"method": "reuse+divprune"}}).selector.name == "divprune"


@pytest.mark.parametrize(
    ("section", "says"),
    [
        ({"method": "cdpruner"}, "reads the question"),
        ({"method": "downscale"}, "acts on frames"),
        ({"method": "evoprune+fastv"}, "inside the language model"),
        ({"method": "none"}, "prunes nothing"),
        ({"method": "evs"}, "how many tokens"),
        ({"method": "evoprune:within=0.01"}, "how many tokens"),
        ({"method": "evoprun"}, "no pruning method"),
        ({"method": "evoprune:reuse=-1"}, "at least 0"),
        ({"method": 3}, "not a name"),
        ({"budget": 0.1}, "no setting 'budget'"),
        ("divprune", "no setting 'divprune'"),
    ],
)
def test_a_method_that_cannot_work_is_refused_with_a_hint(section, says):
    with pytest.raises(UsageError, match=says) as caught:
        method_of({"evoprune": section})
    assert caught.value.hint


def test_budgets():
    assert [served_budget(rate) for rate in (None, 0.0, 0.75, 0.9)] == [1.0, 1.0, 0.25, 0.1]
    assert request_budget({}, 0.9) == 0.1
    assert request_budget({"evoprune_budget": "50%", "fps": 2}, 0.9) == 0.5
    assert request_budget({"evoprune_budget": 1.0}, None) == 1.0
    assert without_own({"evoprune_budget": 0.5, "fps": 2}) == {"fps": 2}


@pytest.mark.parametrize(
    ("options", "rate", "says"),
    [
        ({"evoprune_budget": 0}, 0.5, "not a share"),
        ({"evoprune_budget": "auto"}, 0.5, "does not work here"),
        ({"evoprune_budget": [0.5]}, 0.5, "not a share"),
        ({"evoprune_budget": 0.5}, None, "prunes nothing"),
        ({"evoprune_bugdet": 0.5}, 0.5, "no option"),
    ],
)
def test_a_bad_budget_of_a_request_is_refused(options, rate, says):
    with pytest.raises(UsageError, match=says):
        request_budget(options, rate)
