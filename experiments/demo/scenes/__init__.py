"""The second world: crowded scenes with signs, filmed by a camera that may move."""
