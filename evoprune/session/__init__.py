"""Run the entire pipeline: load a model, read and encode the inputs, and generate an answer.

Most of the work happens in `encoding` and `asking`. `memory` estimates their memory requirements, `prompting` builds prompts and
adds subtitles, and `session` combines the loaded model with its pruning settings. Both the command line and `evoprune.VideoQA` are
built on this package.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.session.ahead import ReadAhead, read_ahead
    from evoprune.session.answers import Answer, Chat
    from evoprune.session.asking import Askable, EncodedInputs
    from evoprune.session.cache import Cache
    from evoprune.session.encoded import EncodedInput
    from evoprune.session.encoding import OpenInput, OpenInputs, inputs_of, open_inputs
    from evoprune.session.hub import BUNDLED_CONFIGS
    from evoprune.session.loading.description import ModelDescription, describe
    from evoprune.session.loading.hosted import meta_model, read_whole
    from evoprune.session.loading.model import LoadedModel, load_model
    from evoprune.session.loading.stored import calibrate, calibrate_tower
    from evoprune.session.loading.weights import DTYPES, weights_of
    from evoprune.session.options import FindOptions, ModelOptions, PipelineOptions, PruneOptions, StreamOptions
    from evoprune.session.prompting import prompt_about, with_subtitles
    from evoprune.session.reading import probed
    from evoprune.session.report import pruning_facts
    from evoprune.session.session import Session
    from evoprune.session.speech import speech_of
    from evoprune.session.upcoming import in_flight

__all__ = [
    "BUNDLED_CONFIGS",
    "DTYPES",
    "Answer",
    "Askable",
    "Cache",
    "Chat",
    "EncodedInput",
    "EncodedInputs",
    "FindOptions",
    "LoadedModel",
    "ModelDescription",
    "ModelOptions",
    "OpenInput",
    "OpenInputs",
    "PipelineOptions",
    "PruneOptions",
    "ReadAhead",
    "Session",
    "StreamOptions",
    "calibrate",
    "calibrate_tower",
    "describe",
    "in_flight",
    "inputs_of",
    "load_model",
    "meta_model",
    "open_inputs",
    "probed",
    "prompt_about",
    "pruning_facts",
    "read_ahead",
    "read_whole",
    "speech_of",
    "weights_of",
    "with_subtitles",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "ahead": ["ReadAhead", "read_ahead"],
        "answers": ["Answer", "Chat"],
        "asking": ["Askable", "EncodedInputs"],
        "cache": ["Cache"],
        "encoded": ["EncodedInput"],
        "encoding": ["OpenInput", "OpenInputs", "inputs_of", "open_inputs"],
        "hub": ["BUNDLED_CONFIGS"],
        "loading.description": ["ModelDescription", "describe"],
        "loading.hosted": ["meta_model", "read_whole"],
        "loading.model": ["LoadedModel", "load_model"],
        "loading.stored": ["calibrate", "calibrate_tower"],
        "loading.weights": ["DTYPES", "weights_of"],
        "options": ["FindOptions", "ModelOptions", "PipelineOptions", "PruneOptions", "StreamOptions"],
        "prompting": ["prompt_about", "with_subtitles"],
        "reading": ["probed"],
        "report": ["pruning_facts"],
        "session": ["Session"],
        "speech": ["speech_of"],
        "upcoming": ["in_flight"],
    },
)
