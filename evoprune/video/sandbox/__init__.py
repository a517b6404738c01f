"""Runs the readers in a separate process, so that a malformed or malicious file cannot crash or block the current process.

The interface for callers is `isolation`, which starts and manages worker processes. `worker` is the program that these processes
run, and `channel` transfers messages and frames between the processes.
"""
