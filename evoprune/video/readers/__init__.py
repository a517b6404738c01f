"""Reading video files, folders of images and pictures, in the sandbox's worker process where that is possible.

`metadata.probe` says what a path holds. Frames come from the reader of it: `pyav`, `decord`, `folder` or `picture`. Each has
`read(info, times_s, damaged)`: for each time, which ascend, the frame on screen, as its own time in seconds from the first frame
and uint8 `[H, W, 3]` as displayed; one array serves all times of one frame. `damaged` gets a number for each damaged packet or
image. `pyav` and `folder` also have `intervals`, for a scan. They raise `VideoError` where a file cannot be read (any more), or
nothing in it can be decoded.
"""
