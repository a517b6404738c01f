"""Measure a model with its real weights: equality with transformers, speed, and accuracy on public benchmarks."""
