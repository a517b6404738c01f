"""Pruning methods to compare with, found as plug-ins are, and what only they use."""
