"""Run the entire pipeline: load a model, read and encode the inputs, and generate an answer.

Most of the work happens in `encoding` and `asking`. `memory` estimates their memory requirements, `prompting` builds prompts and
adds subtitles, and `session` combines the loaded model with its pruning settings. Both the command line and `evoprune.VideoQA` are
built on this package.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
