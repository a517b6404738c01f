"""Draw the pictures and write the examples of README and docs."""
