"""Readers of video files, folders of images and pictures: sandbox/worker.py chooses among `pyav`, `decord`, `folder` and `picture`.

Each has `read(info, times_s, damaged)`: for each time, which ascend, the frame on screen (`ffmpeg.Shown`). One array serves all
times of a frame.
`damaged` gets a mark for each damaged packet or image. `VideoError` is raised where a file cannot be read (any more), or nothing in
it can be decoded.
"""
