"""Reading video files, folders of images and pictures. `metadata.probe` says what a path holds, and `pyav`, `decord`, `folder` or
`picture` reads it. Each has `read(info, times_s, damaged)`: for each time, which ascend, the frame on screen, as its own time in
seconds from the first frame and uint8 `[H, W, 3]` as displayed; one array serves all times of a frame. `damaged` gets a number for
each damaged packet or image. `VideoError` is raised where a file cannot be read (any more), or nothing in it can be decoded.
"""
