"""Scripts for measuring, comparing, drawing, and training. They are needed for a release, but not by the installed package.

To see how to use a script, run `python -m experiments.FOLDER.NAME --help` in the repository root. The scripts in `speed` measure
times, `accuracy` compares answers, `environments` runs tests in separate environments, `pictures` draws the images for README and
docs, and `demo` generates the clips and trains the demo models. `tables.py`, `timing.py`,
and `svg.py` are shared.
"""
