from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.evoprune_paper import EvoPrunePaper


def published(**settings) -> EvoPrunePaper:
    """Merging with all that the paper has at work."""
    return EvoPrunePaper(**settings)


def late(**settings) -> EvoPrune:
    """This project's method with the selection after all layers."""
    return EvoPrune(**{"depth": 1.0} | settings)
