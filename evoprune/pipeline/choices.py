"""What options may be set to, where the command line's help can name it without importing torch or numpy."""

SYNTHETIC = ("motion", "static90", "noise")
# Clips of the demo's generator: to report on, to tune on, and a family of its own that is never tuned on.
SPLITS = ("heldout", "validation", "portrait")
