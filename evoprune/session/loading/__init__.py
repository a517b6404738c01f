"""Load a model: a bundled demo, a local folder, a hub id, or a full-size model with random weights.

`description` reads the model's small files and picks a device, `weights` predicts how much memory the weights take, and `model`
loads the model. Only safetensors files are read, and code that is shipped with a model is never executed.
"""
