"""Load a model from a bundled demo, a local folder, or the hub, or create a full-size model with random weights.

`description` reads the model's small files and picks a device, `weights` estimates the memory needed for the weights, and `model`
loads the model. Only safetensors and GGUF files are read, and code shipped with a model is never executed.
"""
