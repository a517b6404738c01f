"""The implementation of `evoprune verify`, which checks that a model produces the same results as transformers on this machine."""
