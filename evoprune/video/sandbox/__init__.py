"""Runs the readers in another process, so that a broken or malicious file cannot crash or stall this one.

Callers use `isolation`, which borrows a worker process that runs `worker`. Messages and frames travel over a `channel`.
"""
