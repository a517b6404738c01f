"""`evoprune serve`: a single-machine server with an OpenAI-compatible API.

Starlette and torch are only imported when the command runs.
"""

from evoprune_serve.command import serve

__all__ = ["serve"]
