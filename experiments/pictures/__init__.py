"""Draw the pictures and write the examples for README and docs."""
