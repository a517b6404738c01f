"""Finds, without labels, the fastest setting that changes a model's answers little enough: what `evoprune tune` runs."""
