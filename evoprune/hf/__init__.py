"""Pruning inside a Hugging Face model that the user holds: `evoprune.EvoPrune`, `evoprune.apply` and `evoprune.encode`.

The model's `generate` and `forward` take the usual inputs of its processor, and run on fewer video tokens.
"""
