"""Whether this machine computes with this model what transformers computes: what `evoprune verify` runs.

`checks.py` lists the checks; `subject.py` holds what they compare; `run.py` runs them.
"""
