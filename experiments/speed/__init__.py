"""Time evoprune and its parts, beside other programs: what `results/` has in seconds and tokens a second."""
