"""Compare the answers of methods, presets, settings and precisions, on the clips and questions of `experiments.demo`."""
