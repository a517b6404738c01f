"""Runs the readers in a separate process, so that a malformed or malicious file cannot crash or block the current process.

Callers use `isolation`, which borrows a worker process that runs `worker`. Messages and frames are exchanged through `channel`.
"""
