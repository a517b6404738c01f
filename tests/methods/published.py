from evoprune.methods.evoprune_paper import EvoPrunePaper


def published(**settings) -> EvoPrunePaper:
    """The method with all parts that the paper has at work, of which the defaults leave some out."""
    return EvoPrunePaper(**{"allocation": "skip", "attention": 0.1, "critical": 0.1} | settings)
