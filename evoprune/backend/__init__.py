"""What a device does in its own way: the selection, attention, copies and time. Everything else is the same on every device.

A kernel of Triton has plain PyTorch beside it, which runs where there is no Triton and with `EVOPRUNE_PLAIN=1`.
"""
