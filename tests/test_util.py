"""Short texts, such as time estimates."""

import pytest

from evoprune.util import roughly


@pytest.mark.parametrize(
    ("seconds", "says"),
    [
        (0.0, "~0 s"),
        (0.04, "~0.04 s"),
        (0.33, "~0.3 s"),
        (0.96, "~1 s"),
        (4.6, "~5 s"),
        (600.0, "~10 min"),
        (9e3, "~2 h"),
    ],
)
def test_an_estimate_has_a_digit_that_is_not_0(seconds, says):
    assert roughly(seconds) == says
