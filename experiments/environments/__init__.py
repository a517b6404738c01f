"""Run tests, and measure vLLM, in environments that the usual one cannot be."""
