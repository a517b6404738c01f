"""evoprune: ask Qwen2.5-VL about videos, with visual tokens pruned inside the vision encoder."""

__version__ = "0.1.0"
