"""Measurements and training that are not part of the installed package. Run them from the root of the repository.

`python -m experiments.NAME --help`, with NAME one of ablations, comparison, kernels, decoders, first_word,
checkpoint, demo.train and demo.samples. The other modules are imported by these.
"""
