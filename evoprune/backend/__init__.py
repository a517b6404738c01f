"""Device-specific code. Callers pass in a device or tensors, and the functions in this package adapt to the device.

Every kernel and CUDA graph has a fallback in plain PyTorch, used if the kernel can't run or if `EVOPRUNE_PLAIN=1` is set.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
