"""Batches, which answer many questions about many videos, either on this machine or on Ray, and write a record for each answer.

The code that reads rows is also used by `evoprune eval`.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__, call="evoprune.batch.answers")
