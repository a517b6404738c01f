"""The parts of encoded inputs that their public interface doesn't show, for tests in other folders."""

from collections.abc import Sequence

from evoprune.vision import Encoded


def encodings_of(inputs) -> Sequence[Encoded]:
    """Return the encoding of each input."""
    return [each.encoded for each in inputs._encodings]
