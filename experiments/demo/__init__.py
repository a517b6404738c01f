"""Training of the bundled demo models, and the clips in `samples/`: `python -m experiments.demo.train OUT`."""

import os

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")  # read by torch; the default forgets shapes too soon
