"""evoprune: ask Qwen2.5-VL or Qwen2-VL about videos, with visual tokens pruned inside the vision encoder.

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
    from evoprune.pipeline.answering import Answer, EncodedInputs, EncodedVideo
    from evoprune.pipeline.cache import Cache
    from evoprune.pipeline.video_qa import VideoQA
    from evoprune.report.records import Report
    from evoprune.vision.encoded import Encoded

_SOURCES = {
    "Answer": "evoprune.pipeline.answering:Answer",
    "Cache": "evoprune.pipeline.cache:Cache",
    "Columns": "evoprune.huggingface.columns:Columns",
    "EvoPrune": "evoprune.huggingface.context:PruningContext",
    "Encoded": "evoprune.vision.encoded:Encoded",
    "EncodedInputs": "evoprune.pipeline.answering:EncodedInputs",
    "EncodedVideo": "evoprune.pipeline.answering:EncodedVideo",
    "EvopruneError": "evoprune.errors:EvopruneError",
    "ModelError": "evoprune.errors:ModelError",
    "OutOfMemory": "evoprune.errors:OutOfMemory",
    "PrunedModel": "evoprune.huggingface.context:PrunedModel",
    "Report": "evoprune.report.records:Report",
    "UsageError": "evoprune.errors:UsageError",
    "VideoError": "evoprune.errors:VideoError",
    "VideoQA": "evoprune.pipeline.video_qa:VideoQA",
    "apply": "evoprune.huggingface.context:apply",
    "encode": "evoprune.huggingface.encoding:encode",
    "processor_inputs": "evoprune.huggingface.processor_inputs:processor_inputs",
    "remove": "evoprune.huggingface.context:remove",
}
__all__ = [
    "Answer",
    "Cache",
    "Columns",
    "Encoded",
    "EncodedInputs",
    "EncodedVideo",
    "EvoPrune",
    "EvopruneError",
    "ModelError",
    "OutOfMemory",
    "PrunedModel",
    "Report",
    "UsageError",
    "VideoError",
    "VideoQA",
    "apply",
    "encode",
    "methods",
    "processor_inputs",
    "remove",
]


def __getattr__(name: str):
    if name == "methods":
        return import_module("evoprune.methods")
    if name in _SOURCES:
        module, _, attribute = _SOURCES[name].partition(":")
        return getattr(import_module(module), attribute)
    raise AttributeError(f"module 'evoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
