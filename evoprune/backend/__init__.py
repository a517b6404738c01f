"""What depends on the device: functions that others call with a device or with tensors on it, and that ask what it is.

Kernels and graphs have a form in plain PyTorch beside them, which runs where they cannot, and with `EVOPRUNE_PLAIN=1`.
"""
