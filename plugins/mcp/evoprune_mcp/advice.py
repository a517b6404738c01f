"""Adapts hints and warnings, which are written for the command line and Python, to agents."""

import re

OWN = re.compile(r"--(start|end|budget)\b")  # options that are also arguments of a tool
# A part of a text that agents can't follow: an option, a command, or advice about Python or standard input.
SHELL = re.compile(r"(^|[\s(])--?[a-zA-Z]|\bevoprune [a-z]|\bin Python\b|\bulimit\b|standard input")


def for_agents(text: str) -> str:
    """Remove the parts of a hint or a warning that agents can't follow. Returns an empty string if nothing is left."""
    parts = re.split(r"(?<=[;,]) |(?<=\w\w\.) ", OWN.sub(r"\1", text))
    return " ".join(part for part in parts if not SHELL.search(part)).rstrip(";, ")
