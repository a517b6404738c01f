"""CPU-specific layers: packed and quantized weights."""
