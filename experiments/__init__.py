"""Scripts that measure, compare, draw and train. They are needed for a release, but not by the installed package.

To see how a script is used, run `python -m experiments.FOLDER.NAME --help` in the repository's root folder. The scripts in `speed`
measure times, those in `accuracy` compare answers, `environments` runs tests in separate environments, `pictures` draws the
pictures for README and docs, and `demo` generates the clips and trains the demo models. `tables.py`, `timing.py` and `svg.py` are
shared.
"""
