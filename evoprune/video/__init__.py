"""Videos: what is in a file (`probe`), which frames to take (`sampling`, `plan`), and the frames themselves (`frames`).

`readers` calls FFmpeg. Files are not trusted: `sandbox` runs the readers in another process, which a broken file may crash.
"""
