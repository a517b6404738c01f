"""Readers for video files, folders of images, animations, and still images. reader_table.py lists them in `READERS`.

The module of every reader has these functions:

- `claims(path)` returns True if the reader reads this input. It must not raise exceptions, and returns True even for a damaged file
  whose beginning belongs to the reader, so that the reader can explain what is wrong.
- `probe(path, fps)` returns the metadata of an input (`Video`). `fps` is the frame rate for inputs that don't specify their own.
- `read(info, times_s, damaged)` yields the frame on screen at each requested time (`ffmpeg.Shown`). The times must be in ascending
  order. If the same frame is on screen at several times, its array is shared.
- `intervals(info, damaged)` decodes all frames. It yields each frame's timestamp and duration in seconds, and whether it is a
  keyframe. The frames may be out of order.
- `frame_times(info)` returns the display times of all frames (`FrameTimes`).

Times are in seconds from the first frame. For each damaged packet or image, `read` and `intervals` call `damaged` with a mark that
identifies the damage. All functions except `claims` raise `VideoError` if the file cannot be read or contains no decodable frames.
Errors of PyAV and of the file system are converted by the caller (`ffmpeg.converting`); a reader that uses another library converts
its errors. For an input that contains images, `images.ImageSequence` implements all functions except `claims`.
"""
