"""Draw the images and write the examples for README and docs."""
