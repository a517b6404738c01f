"""A question from beginning to end: a model is loaded, inputs are opened, planned and encoded, an answer is generated.

`inputs`, `encoding` and `answering` are the steps, `engine` is what they share; `evoprune.VideoQA` calls them.
"""
