"""Readers for video files, folders of images, and still images. sandbox/worker.py chooses the reader for each input.

Each reader has a function `read(info, times_s, damaged)`, which yields the frame on screen (`ffmpeg.Shown`) at each time. The times
must be in ascending order. If the same frame is on screen at several times, its array is shared. The reader calls `damaged` with a
mark for each damaged packet or image. It raises `VideoError` if the file cannot be read, or if nothing in it can be decoded.
"""
