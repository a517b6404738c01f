"""Readers of video files, folders of images and still images. sandbox/worker.py chooses the reader.

Each reader has a function `read(info, times_s, damaged)`, which yields the frame on screen (`ffmpeg.Shown`) at each time. The times
must ascend, and all times of the same frame share one array. `damaged` is called with a mark for each damaged packet or image.
`VideoError` is raised if a file cannot be read (any longer), or if nothing in it can be decoded.
"""
