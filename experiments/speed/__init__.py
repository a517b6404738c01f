"""Measure the speed of evoprune and its components, and compare it with other programs. Produces the timings in `results/`."""
