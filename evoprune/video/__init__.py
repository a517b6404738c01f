"""Videos: what is in a file, and its frames (`frames`), what is known about it (`info`), and which frames to take (`plan`).

`readers` calls FFmpeg. Files are not trusted: `sandbox` runs the readers in another process, which a broken file may crash.
"""
