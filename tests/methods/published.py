from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.evoprune_paper import EvoPrunePaper


def published(**settings) -> EvoPrunePaper:
    """The method with all parts that the paper has at work, of which the defaults leave some out."""
    return EvoPrunePaper(**{"allocation": "skip", "attention": 0.1, "critical": 0.1} | settings)


def late(**settings) -> EvoPrune:
    """Our own method with nothing chosen before all layers are done: the encoder's budget is what is left after merging."""
    return EvoPrune(**{"depth": 1.0} | settings)
