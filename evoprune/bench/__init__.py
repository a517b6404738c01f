"""Measurements: speed (profiling), accuracy (evaluation), the fastest setting that holds (tuning), and their charts."""
