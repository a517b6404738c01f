"""Pictures: an overlay that shows on a video's frames which units the model reads, reuses and merges, and charts of results.

It draws what the encoder and the evaluation report, and changes neither.
"""
