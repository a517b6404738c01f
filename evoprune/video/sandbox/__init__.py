"""Runs the readers in a separate process, so that a malformed or malicious file cannot crash or block the current process.

The public interface is `isolation`, which starts and manages worker processes. These processes run `worker`, and `channel`
transfers messages and frames between processes.
"""
