"""The checks of `evoprune verify`: this machine and this model against transformers."""
