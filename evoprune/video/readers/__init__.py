"""Reading video files and folders of images: metadata, a scan of the whole file, and frames by PyAV or decord.

This code runs in the sandbox's worker process; only where that is not possible does it run in the caller's process.
"""
