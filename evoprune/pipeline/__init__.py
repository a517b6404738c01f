"""The whole pipeline: a model is loaded, a video is opened and encoded, questions are answered.

`video_qa` is the public entrance; `encoding` and `answering` are the steps, and `engine` is what they share.
"""
