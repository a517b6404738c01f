"""Latency, counts and memory against plain Hugging Face transformers on the same weights: what `evoprune profile` runs.

`run.py` measures in rounds; `results.py` makes figures of the raw samples.
"""
