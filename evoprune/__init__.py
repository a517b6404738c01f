"""evoprune: ask Qwen2.5-VL or Qwen2-VL about videos, with visual tokens pruned inside the vision encoder.

Names are imported when they are first used, so that `import evoprune` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evoprune import methods
    from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError, VideoError
    from evoprune.huggingface.context import EvoPrune, apply, encode
    from evoprune.pipeline.answering import Answer, EncodedVideo
    from evoprune.pipeline.video_qa import VideoQA
    from evoprune.report import Report

_MODULES = {
    "Answer": "evoprune.pipeline.answering",
    "EncodedVideo": "evoprune.pipeline.answering",
    "EvoPrune": "evoprune.huggingface.context",
    "EvopruneError": "evoprune.errors",
    "ModelError": "evoprune.errors",
    "OutOfMemory": "evoprune.errors",
    "Report": "evoprune.report",
    "UsageError": "evoprune.errors",
    "VideoError": "evoprune.errors",
    "VideoQA": "evoprune.pipeline.video_qa",
    "apply": "evoprune.huggingface.context",
    "encode": "evoprune.huggingface.context",
}
__all__ = [
    "Answer",
    "EncodedVideo",
    "EvoPrune",
    "EvopruneError",
    "ModelError",
    "OutOfMemory",
    "Report",
    "UsageError",
    "VideoError",
    "VideoQA",
    "apply",
    "encode",
    "methods",
]


def __getattr__(name: str):
    if name == "methods":
        return import_module("evoprune.methods")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'evoprune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["__version__", *__all__]
