"""CPU-specific code: packed and 8-bit layers, threads, and the precision of sums."""
