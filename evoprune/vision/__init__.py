"""Turns frames into visual tokens: preprocessing, and the vision tower with pruning between its layers.

`encode_rows` runs the tower according to a pruning method's plan and returns `TowerOutput`. `TowerOutput.select_tokens` then
selects the visual tokens and returns them as `Encoded`. The weights come from a Qwen vision tower loaded either by this project or
by Hugging Face transformers.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
