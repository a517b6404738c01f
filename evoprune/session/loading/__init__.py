"""Loading a whole model: a bundled demo, a folder, a hub id, or true dimensions with random weights.

`model` is the entrance; `find` says where a model is and what its files say. Only safetensors are read, and no code that comes with
a model is run.
"""
