"""Loading a whole model: a bundled demo, a folder, a hub id, or true dimensions with random weights.

`description` holds what small files and the device say of a model, `hub` downloads it, `weights` says what its weights will take,
and `model` loads it. Only safetensors are read, and no code that comes with a model is run.
"""
