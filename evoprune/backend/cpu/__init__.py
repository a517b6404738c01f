"""CPU layers with packed or quantized weights."""
