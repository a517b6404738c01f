"""Training of the bundled demo model, and the clips in `samples/`: `python -m experiments.demo.train OUT`."""
