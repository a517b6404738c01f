"""The command-line interface: parses arguments, calls evoprune, and prints the results.

Torch is imported only by commands that need it.
"""

from evoprune.doors import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)
