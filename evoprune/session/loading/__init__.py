"""Load a whole model: a bundled demo, a folder, a hub id, or true dimensions with random weights.

`description` collects what small files and the device tell about a model, `weights` predicts the memory for its weights, and
`model` loads it. Only safetensors are read, and no code that comes with a model is run.
"""
