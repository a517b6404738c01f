"""Accuracy against budget, on questions with known answers: what `evoprune eval` runs.

`run.py` asks every question in full and once for each method and budget; `scores.py` makes the table with its intervals.
"""
