"""Latency, counts and memory against plain Hugging Face transformers on the same weights: what `evoprune profile` runs."""
