"""The command line: parses, calls evoprune, renders. No logic of its own, and no torch before it is needed."""
