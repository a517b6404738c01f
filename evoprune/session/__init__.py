"""A question from beginning to end: a model is loaded, inputs are opened, planned and encoded, an answer is generated.

`encoding` and `asking` are the steps, `planning`, `memory` and `prompting` say beforehand what they will take, and `session` is
what all share. `evoprune.VideoQA` calls them.
"""
