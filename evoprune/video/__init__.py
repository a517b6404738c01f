"""Video input: probing files, planning which frames to sample, and decoding them.

`frames` probes files and reads their frames, `info` defines the classes that describe a video, and `plan` chooses which frames to
read. The decoders in `readers` are based on PyAV (FFmpeg), decord, and Pillow. Because input files are untrusted, `sandbox` runs
the decoders in a separate process, so that a malformed file cannot crash the calling program.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
