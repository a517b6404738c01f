"""Runs the readers in another process, so that a broken or malicious file cannot crash or stall this one.

`isolation` is the entry: it borrows a process from `pool`; that process runs `worker`; frames come back in shared `memory`.
"""
