"""Measurements for the `profile`, `eval`, `tune`, and `verify` commands, and images that show which units pruning keeps.

The command line uses only the names in `__all__`. They are imported lazily, on first use, because most of them require torch.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.bench.agreement import Reference
    from evoprune.bench.chart import Panel, Point, Series, draw
    from evoprune.bench.clips import synthetic_clip
    from evoprune.bench.eval import Evaluation
    from evoprune.bench.eval_settings import EvalSettings
    from evoprune.bench.hugging_face import hugging_face_model
    from evoprune.bench.overlay import Fates, TracedVideo
    from evoprune.bench.processes import map_in_processes
    from evoprune.bench.profile import Profile
    from evoprune.bench.profile_rows import Case, ProfileSettings
    from evoprune.bench.questions import VideoQuestions, grade
    from evoprune.bench.results import Results, text_table
    from evoprune.bench.sheet import contact_sheet
    from evoprune.bench.tune import TuneSettings, Tuning
    from evoprune.bench.tune_operations import OperationTuning
    from evoprune.bench.verify.run import run_checks

__all__ = [
    "Case",
    "EvalSettings",
    "Evaluation",
    "Fates",
    "OperationTuning",
    "Panel",
    "Point",
    "Profile",
    "ProfileSettings",
    "Reference",
    "Results",
    "Series",
    "TracedVideo",
    "TuneSettings",
    "Tuning",
    "VideoQuestions",
    "contact_sheet",
    "draw",
    "grade",
    "hugging_face_model",
    "map_in_processes",
    "run_checks",
    "synthetic_clip",
    "text_table",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "agreement": ["Reference"],
        "chart": ["Panel", "Point", "Series", "draw"],
        "clips": ["synthetic_clip"],
        "eval": ["Evaluation"],
        "eval_settings": ["EvalSettings"],
        "hugging_face": ["hugging_face_model"],
        "overlay": ["Fates", "TracedVideo"],
        "processes": ["map_in_processes"],
        "profile": ["Profile"],
        "profile_rows": ["Case", "ProfileSettings"],
        "questions": ["VideoQuestions", "grade"],
        "results": ["Results", "text_table"],
        "sheet": ["contact_sheet"],
        "tune": ["TuneSettings", "Tuning"],
        "tune_operations": ["OperationTuning"],
        "verify.run": ["run_checks"],
    },
)
