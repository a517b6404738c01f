"""Reading videos: where they come from (`source`), what they hold (`probe`, `scan`), which moments to look at (`sampling`),
and the frames shown then (`decode`).

Videos are not trusted. These modules only ask; FFmpeg is used by others (`tasks`: with `facts`, `survey`, and `pyav` or `decord`
for files, `folder` for images), in a process apart (`isolation` here, `worker` there, `channel` between them).
"""
