"""Load a model: a bundled demo, a local folder, a hub id, or a full-size model with random weights.

`description` collects facts from the model's small files and about the device, `weights` predicts how much memory the weights take,
and `model` loads the model. Only safetensors files are read, and code that comes with a model is never run.
"""
