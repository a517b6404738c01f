"""Runs the readers in a separate process, so that a malformed or malicious file cannot crash or block the current process.

Callers use `isolation`, which starts worker processes and lends them out. `worker` is the program that these processes run, and
`channel` transfers messages and frames.
"""
