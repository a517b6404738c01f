"""`evoprune mcp`: a Model Context Protocol server over stdio. The `mcp` package and torch are only imported when it runs."""

from evoprune_mcp.command import mcp

__all__ = ["mcp"]
