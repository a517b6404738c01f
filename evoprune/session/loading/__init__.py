"""Load a model: a bundled demo, a local folder, a hub id, or a full-size model with random weights.

`description` collects facts from a model's small files and the device, `weights` predicts the memory for its weights, and `model`
loads it. Only safetensors files are read, and code that comes with a model is never run.
"""
