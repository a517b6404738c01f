"""Measure, compare, draw and train: scripts that a release needs and the installed package does not. Run from the repository root.

Run `python -m experiments.FOLDER.NAME --help`. The folders: `speed` measures time, `accuracy` compares answers, `environments` runs
tests in separate environments, `pictures` draws for README and docs, `demo` makes the clips and trains the demo models.
`tables.py`, `timing.py` and `svg.py` are shared.
"""
