"""`evoprune mcp`: a Model Context Protocol server over stdio. Only the command itself imports the package `mcp` and torch."""

from evoprune_mcp.command import mcp

__all__ = ["mcp"]
