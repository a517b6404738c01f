"""Run tests in environments that the usual one cannot be."""
