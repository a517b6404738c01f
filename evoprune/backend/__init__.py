"""What a device does its own way: kernels, graphs and what else is chosen by the device.

Every one of them has a plain form in PyTorch beside it, and `EVOPRUNE_PLAIN=1` switches all of them off.
"""
