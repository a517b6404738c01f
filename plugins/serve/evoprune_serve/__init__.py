"""`evoprune serve`: a server for one machine that speaks OpenAI's protocol. Only the command itself imports starlette and torch."""

from evoprune_serve.command import serve

__all__ = ["serve"]
