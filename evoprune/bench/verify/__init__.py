"""The implementation of `evoprune verify`, which checks that a model gives the same results as in transformers on this machine."""
