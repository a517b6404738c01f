"""Whether this machine computes with this model what transformers computes: what `evoprune verify` runs.

`run.py` lists the checks and runs them; `subject.py` holds what they compare.
"""
