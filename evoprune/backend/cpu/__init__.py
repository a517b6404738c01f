"""What a CPU does in its own way: packed and 8-bit layers, threads, and how precise sums are."""
