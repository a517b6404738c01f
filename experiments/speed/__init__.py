"""Measure how fast evoprune and its parts are, compared with other programs. Produces the times and token rates in `results/`."""
