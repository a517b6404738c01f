"""Compare the answers of methods, presets, settings, and precisions, on the clips and questions from `experiments.demo`."""
