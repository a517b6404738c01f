"""Readers of video files, folders of images and pictures. sandbox/worker.py chooses among `pyav`, `decord`, `folder` and `picture`.

Every reader has `read(info, times_s, damaged)`, which yields the frame on screen (`ffmpeg.Shown`) at every time. Times ascend, and
all times of the same frame share one array. `damaged` is called with a mark for each damaged packet or image. `VideoError` is
raised if a file cannot be read (any more) or nothing in it can be decoded.
"""
