"""Time evoprune and its parts against other programs. Produces the timings and token rates in `results/`."""
