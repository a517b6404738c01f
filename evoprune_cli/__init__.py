"""The command-line interface: parses arguments, calls evoprune, and prints the results.

Torch is imported only by commands that need it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
