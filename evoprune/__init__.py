"""evoprune: ask Qwen3.8, Qwen3.6, Qwen3.5, Qwen3-VL, or Qwen2.5-VL about videos, and prune visual tokens inside the encoder.

Public names are imported on first use, so `import evoprune` itself takes almost no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from evoprune import methods
    from evoprune.errors import EvopruneError, ModelError, OutOfMemory, UsageError, VideoError
    from evoprune.hf import Columns, EvoPrune, PrunedModel, apply, encode, processor_inputs, remove
    from evoprune.live import VideoStream
    from evoprune.moments import Moment
    from evoprune.report import Report
    from evoprune.session import Answer, Cache, Chat, EncodedInputs, read_ahead
    from evoprune.video import read_frames
    from evoprune.video_qa import VideoQA
    from evoprune.vision import Encoded

_SOURCES = {
    "errors": ("EvopruneError", "ModelError", "OutOfMemory", "UsageError", "VideoError"),
    "hf.columns": ("Columns",),
    "hf.context": ("EvoPrune", "PrunedModel", "apply", "remove"),
    "hf.encoding": ("encode",),
    "hf.inputs": ("processor_inputs",),
    "session.ahead": ("read_ahead",),
    "session.answers": ("Answer", "Chat"),
    "session.asking": ("EncodedInputs",),
    "session.cache": ("Cache",),
    "live.stream": ("VideoStream",),
    "moments.search": ("Moment",),
    "video.arrays": ("read_frames",),
    "video_qa": ("VideoQA",),
    "report": ("Report",),
    "vision.encoder": ("Encoded",),
}
__all__ = [
    "Answer",
    "Cache",
    "Chat",
    "Columns",
    "Encoded",
    "EncodedInputs",
    "EvoPrune",
    "EvopruneError",
    "ModelError",
    "Moment",
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
    "read_ahead",
    "read_frames",
    "remove",
]

# Suggestions for names that other libraries use.
_MEANT = dict.fromkeys(
    ("load", "load_model", "from_pretrained", "pipeline", "Model", "LLM", "AutoModel"), "evoprune.VideoQA.load"
) | {"ask": "evoprune.VideoQA.load(model).ask", "Video": "evoprune.VideoQA.load(model).encode"}


if not TYPE_CHECKING:  # type checkers that see `__getattr__` would accept any module attribute

    def __getattr__(name: str):
        if name == "methods":
            return import_module("evoprune.methods")
        for module, names in _SOURCES.items():
            if name in names:
                return getattr(import_module(f"evoprune.{module}"), name)
        from evoprune.suggestions import unknown_attribute

        raise unknown_attribute("module 'evoprune'", name, _MEANT, __all__)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
