"""Questions for a device, and what it does in its own way: kernels, graphs, and what else is chosen by the device.

Kernels and graphs have a plain form in PyTorch beside it, which runs where they cannot, and with `EVOPRUNE_PLAIN=1`.
"""
