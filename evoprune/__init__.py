"""evoprune: ask Qwen3-VL, Qwen2.5-VL or Qwen2-VL about videos, with visual tokens pruned inside the vision encoder.

Names are imported when they are first used, so that `import evoprune` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evoprune import methods
    from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError, VideoError
    from evoprune.huggingface.columns import Columns
    from evoprune.huggingface.context import PrunedModel, apply, remove
    from evoprune.huggingface.context import PruningContext as EvoPrune
    from evoprune.huggingface.encoding import encode
    from evoprune.huggingface.processor_inputs import processor_inputs
    from evoprune.pipeline.answering import Answer, EncodedInputs
    from evoprune.pipeline.cache import Cache
    from evoprune.pipeline.stream import VideoStream
    from evoprune.pipeline.video_qa import VideoQA
    from evoprune.report.records import Report
    from evoprune.vision.encoded import Encoded

_SOURCES = {
    "errors": ("EvopruneError", "ModelError", "OutOfMemory", "UsageError", "VideoError"),
    "huggingface.columns": ("Columns",),
    "huggingface.context": ("EvoPrune", "PrunedModel", "apply", "remove"),
    "huggingface.encoding": ("encode",),
    "huggingface.processor_inputs": ("processor_inputs",),
    "pipeline.answering": ("Answer", "EncodedInputs"),
    "pipeline.cache": ("Cache",),
    "pipeline.stream": ("VideoStream",),
    "pipeline.video_qa": ("VideoQA",),
    "report.records": ("Report",),
    "vision.encoded": ("Encoded",),
}
__all__ = [
    "Answer",
    "Cache",
    "Columns",
    "Encoded",
    "EncodedInputs",
    "EvoPrune",
    "EvopruneError",
    "ModelError",
    "OutOfMemory",
    "PrunedModel",
    "Report",
    "UsageError",
    "VideoError",
    "VideoQA",
    "VideoStream",
    "apply",
    "encode",
    "methods",
    "processor_inputs",
    "remove",
]


def __getattr__(name: str):
    if name == "methods":
        return import_module("evoprune.methods")
    for module, names in _SOURCES.items():
        if name in names:
            return getattr(import_module(f"evoprune.{module}"), {"EvoPrune": "PruningContext"}.get(name, name))
    raise AttributeError(f"module 'evoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
