"""Run tests in environments that differ from the usual development environment."""
