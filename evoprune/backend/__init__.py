"""What a device does in its own way: kernels, graphs, and what else is chosen by the device.

Each of them has a plain form in PyTorch beside it, which runs where a kernel cannot, and with `EVOPRUNE_PLAIN=1`.
"""
