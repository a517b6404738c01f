"""Whether this machine computes with this model what transformers computes: what `evoprune verify` runs."""
