"""Layers for the CPU with packed or quantized weights."""
