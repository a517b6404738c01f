"""Readers for video files, folders of images, and still images. sandbox/worker.py chooses the reader for each input.

Every reader has a function `read(info, times_s, damaged)`, which yields the frame on screen at each requested time
(`ffmpeg.Shown`). The times must be in ascending order. If the same frame is on screen at several times, its array is shared. For
each damaged packet or image, the reader calls `damaged` with a mark that identifies the damage. `VideoError` is raised if the file
cannot be read or contains no decodable frames.
"""
