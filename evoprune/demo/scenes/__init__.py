"""The second world: crowded pictures with the statistics of natural ones, signs to read, and clips that mostly repeat themselves.

`clip.py` says what a clip is, `compose.py` draws its content from a seed, `drawing.py` makes its frames, `asking.py` asks about it.
"""
