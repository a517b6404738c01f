"""Runs the readers in another process, so that a broken or malicious file cannot crash or stall this one.

`isolation` is the entry: it borrows a worker process, which runs `worker`; messages and frames go over a `channel`.
"""
