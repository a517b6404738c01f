"""Answer questions from beginning to end: load a model, open, plan and encode inputs, and generate an answer.

`encoding` and `asking` do the work. `planning`, `memory` and `prompting` predict its cost, and `session` holds the objects that all
of them share. `evoprune.VideoQA` calls them.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.session import prompting
    from evoprune.session.ahead import FIRST, Asked, ReadAhead, read_ahead
    from evoprune.session.answers import Answer, Chat, Shape, Uncopied
    from evoprune.session.asking import Askable, EncodedInputs, together
    from evoprune.session.cache import Cache, ContentHash, SegmentCache
    from evoprune.session.encoded import EncodedInput
    from evoprune.session.encoding import OpenInput, OpenInputs, Progress, inputs_of, open_inputs, paths_of
    from evoprune.session.inspection import environment_facts, memory_facts, model_facts, plan_facts
    from evoprune.session.keywords import (
        EvoPruneKeywords,
        FindKeywords,
        GenerationKeywords,
        LoadKeywords,
        PruneKeywords,
        SamplingKeywords,
        StreamKeywords,
        UntypedKeywords,
    )
    from evoprune.session.loading.description import ModelDescription, describe, local_folder
    from evoprune.session.loading.hosted import meta_model, read_whole, with_frequencies
    from evoprune.session.loading.hub import BUNDLED_CONFIGS, SMALL_FILES
    from evoprune.session.loading.model import (
        LoadedModel,
        load_model,
        no_tokenizer,
        random_model,
        threads_of_each,
        use_threads,
    )
    from evoprune.session.loading.stored import calibrate, calibrate_tower, weights_folder
    from evoprune.session.loading.weights import DTYPES, weights_of
    from evoprune.session.memory import TEXT, check_carried, check_memory
    from evoprune.session.options import (
        OTHER_MODELS,
        FindOptions,
        GenerationOptions,
        ModelOptions,
        PipelineOptions,
        PruneOptions,
        SamplingOptions,
        StreamOptions,
        record,
    )
    from evoprune.session.planning import plan_input
    from evoprune.session.prompting import (
        check_context,
        check_not_empty,
        check_texts,
        fitting_prompt,
        longest_prompt,
        positions_of,
        prompt_about,
        prompt_subtitles,
    )
    from evoprune.session.reading import chunk_bytes, probed
    from evoprune.session.report import FLAT, inputs_report, pruning_facts
    from evoprune.session.session import Session, check_conversation, check_fits, check_streams
    from evoprune.session.signatures import explained, meaning, takes, type_code
    from evoprune.session.upcoming import idle_cores, in_flight

__all__ = [
    "BUNDLED_CONFIGS",
    "DTYPES",
    "FIRST",
    "FLAT",
    "OTHER_MODELS",
    "SMALL_FILES",
    "TEXT",
    "Answer",
    "Askable",
    "Asked",
    "Cache",
    "Chat",
    "ContentHash",
    "EncodedInput",
    "EncodedInputs",
    "EvoPruneKeywords",
    "FindKeywords",
    "FindOptions",
    "GenerationKeywords",
    "GenerationOptions",
    "LoadKeywords",
    "LoadedModel",
    "ModelDescription",
    "ModelOptions",
    "OpenInput",
    "OpenInputs",
    "PipelineOptions",
    "Progress",
    "PruneKeywords",
    "PruneOptions",
    "ReadAhead",
    "SamplingKeywords",
    "SamplingOptions",
    "SegmentCache",
    "Session",
    "Shape",
    "StreamKeywords",
    "StreamOptions",
    "Uncopied",
    "UntypedKeywords",
    "calibrate",
    "calibrate_tower",
    "check_carried",
    "check_context",
    "check_conversation",
    "check_fits",
    "check_memory",
    "check_not_empty",
    "check_streams",
    "check_texts",
    "chunk_bytes",
    "describe",
    "environment_facts",
    "explained",
    "fitting_prompt",
    "idle_cores",
    "in_flight",
    "inputs_of",
    "inputs_report",
    "load_model",
    "local_folder",
    "longest_prompt",
    "meaning",
    "memory_facts",
    "meta_model",
    "model_facts",
    "no_tokenizer",
    "open_inputs",
    "paths_of",
    "plan_facts",
    "plan_input",
    "positions_of",
    "probed",
    "prompt_about",
    "prompt_subtitles",
    "prompting",
    "pruning_facts",
    "random_model",
    "read_ahead",
    "read_whole",
    "record",
    "takes",
    "threads_of_each",
    "together",
    "type_code",
    "use_threads",
    "weights_folder",
    "weights_of",
    "with_frequencies",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "ahead": ["Asked", "FIRST", "ReadAhead", "read_ahead"],
        "answers": ["Answer", "Chat", "Shape", "Uncopied"],
        "asking": ["Askable", "EncodedInputs", "together"],
        "cache": ["Cache", "ContentHash", "SegmentCache"],
        "encoded": ["EncodedInput"],
        "encoding": ["OpenInput", "OpenInputs", "Progress", "inputs_of", "open_inputs", "paths_of"],
        "inspection": ["environment_facts", "memory_facts", "model_facts", "plan_facts"],
        "keywords": [
            "EvoPruneKeywords",
            "FindKeywords",
            "GenerationKeywords",
            "LoadKeywords",
            "PruneKeywords",
            "SamplingKeywords",
            "StreamKeywords",
            "UntypedKeywords",
        ],
        "loading.description": ["ModelDescription", "describe", "local_folder"],
        "loading.hosted": ["meta_model", "read_whole", "with_frequencies"],
        "loading.hub": ["BUNDLED_CONFIGS", "SMALL_FILES"],
        "loading.model": [
            "LoadedModel",
            "load_model",
            "no_tokenizer",
            "random_model",
            "threads_of_each",
            "use_threads",
        ],
        "loading.stored": ["calibrate", "calibrate_tower", "weights_folder"],
        "loading.weights": ["DTYPES", "weights_of"],
        "memory": ["TEXT", "check_carried", "check_memory"],
        "options": [
            "FindOptions",
            "GenerationOptions",
            "ModelOptions",
            "OTHER_MODELS",
            "PipelineOptions",
            "PruneOptions",
            "SamplingOptions",
            "StreamOptions",
            "record",
        ],
        "planning": ["plan_input"],
        "prompting": [
            "check_context",
            "check_not_empty",
            "check_texts",
            "fitting_prompt",
            "longest_prompt",
            "positions_of",
            "prompt_about",
            "prompt_subtitles",
        ],
        "reading": ["chunk_bytes", "probed"],
        "report": ["FLAT", "inputs_report", "pruning_facts"],
        "session": ["Session", "check_conversation", "check_fits", "check_streams"],
        "signatures": ["explained", "meaning", "takes", "type_code"],
        "upcoming": ["idle_cores", "in_flight"],
    },
)
