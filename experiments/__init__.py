"""Measure, compare, draw and train: what a release needs beside the installed package. Run it from the root of the repository.

`python -m experiments.FOLDER.NAME --help`. The folders: `speed` times, `accuracy` compares answers, `environments` runs tests in
environments of their own, `pictures` draws for README and docs, `demo` makes the clips and trains the demo models. `tables.py`,
`timing.py` and `svg.py` are imported by several.
"""
