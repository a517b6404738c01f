"""The checks that `evoprune verify` runs to compare evoprune with transformers, using one model on this machine."""
