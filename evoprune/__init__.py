"""evoprune: ask Qwen3.8, Qwen3.6, Qwen3.5, Qwen3-VL, or Qwen2.5-VL about videos, and prune visual tokens inside the encoder.

Public names are imported on first use, so `import evoprune` itself takes almost no time.
"""

from importlib import import_module

import lazy_loader

__version__ = "0.1.0"

_import, _, __all__ = lazy_loader.attach_stub(__name__, __file__)

# Suggestions for names that other libraries use.
_MEANT = dict.fromkeys(
    ("load", "load_model", "from_pretrained", "pipeline", "Model", "LLM", "AutoModel"), "evoprune.VideoQA.load"
) | {
    "ask": "evoprune.VideoQA.load(model).ask",
    "Video": "evoprune.VideoQA.load(model).encode",
    "probe": "evoprune.video.probe",
    "version": "evoprune.__version__",
}


# Packages that the documentation mentions, which are attributes even before they are imported.
_PACKAGES = ("batch", "bench", "errors", "hf", "live", "methods", "moments", "report", "session", "video")


def __getattr__(name: str):
    if name in __all__:
        return _import(name)
    if name in _PACKAGES:
        return import_module(f"{__name__}.{name}")
    from evoprune.suggestions import unknown_attribute

    raise unknown_attribute("module 'evoprune'", name, _MEANT, __all__)


def __dir__() -> list[str]:
    return ["__version__", *__all__]
