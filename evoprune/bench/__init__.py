"""Measurements: `profile`, `eval`, `tune` and `verify`, and pictures of what pruning keeps.

The command line uses only the names in `__all__`. Each is imported on first use, because most of them need torch.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.bench import clips
    from evoprune.bench.agreement import agreement_of, compare, reference
    from evoprune.bench.chart import COLOURS, INK, SOFT, Panel, Point, Series, draw
    from evoprune.bench.clips import case_grid, synthetic_frames
    from evoprune.bench.eval import Evaluation, told
    from evoprune.bench.eval_settings import EvalSettings
    from evoprune.bench.hugging_face import hugging_face_model
    from evoprune.bench.overlay import FATES, Fates, TracedVideo, check_drawable, fates, trace
    from evoprune.bench.processes import map_in_processes
    from evoprune.bench.profile import Bench, Profile, all_rows, default_load_format, load
    from evoprune.bench.profile_rows import HUGGING_FACE, SYNTHETIC, Case, ProfileSettings
    from evoprune.bench.questions import VideoQuestions, grade, without_tags
    from evoprune.bench.results import Results, folded, grid
    from evoprune.bench.scores import FULL, LEAST_VIDEOS, METHOD, percentile_interval, resampled
    from evoprune.bench.sheet import contact_sheet
    from evoprune.bench.tune import TuneSettings, Tuning
    from evoprune.bench.tune_operations import OperationTuning
    from evoprune.bench.verify.run import run_checks

__all__ = [
    "COLOURS",
    "FATES",
    "FULL",
    "HUGGING_FACE",
    "INK",
    "LEAST_VIDEOS",
    "METHOD",
    "SOFT",
    "SYNTHETIC",
    "Bench",
    "Case",
    "EvalSettings",
    "Evaluation",
    "Fates",
    "OperationTuning",
    "Panel",
    "Point",
    "Profile",
    "ProfileSettings",
    "Results",
    "Series",
    "TracedVideo",
    "TuneSettings",
    "Tuning",
    "VideoQuestions",
    "agreement_of",
    "all_rows",
    "case_grid",
    "check_drawable",
    "clips",
    "compare",
    "contact_sheet",
    "default_load_format",
    "draw",
    "fates",
    "folded",
    "grade",
    "grid",
    "hugging_face_model",
    "load",
    "map_in_processes",
    "percentile_interval",
    "reference",
    "resampled",
    "run_checks",
    "synthetic_frames",
    "told",
    "trace",
    "without_tags",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "agreement": ["agreement_of", "compare", "reference"],
        "chart": ["COLOURS", "INK", "Panel", "Point", "SOFT", "Series", "draw"],
        "clips": ["case_grid", "synthetic_frames"],
        "eval": ["Evaluation", "told"],
        "eval_settings": ["EvalSettings"],
        "hugging_face": ["hugging_face_model"],
        "overlay": ["FATES", "Fates", "TracedVideo", "check_drawable", "fates", "trace"],
        "processes": ["map_in_processes"],
        "profile": ["Bench", "Profile", "all_rows", "default_load_format", "load"],
        "profile_rows": ["Case", "HUGGING_FACE", "ProfileSettings", "SYNTHETIC"],
        "questions": ["VideoQuestions", "grade", "without_tags"],
        "results": ["Results", "folded", "grid"],
        "scores": ["FULL", "LEAST_VIDEOS", "METHOD", "percentile_interval", "resampled"],
        "sheet": ["contact_sheet"],
        "tune": ["TuneSettings", "Tuning"],
        "tune_operations": ["OperationTuning"],
        "verify.run": ["run_checks"],
    },
)
