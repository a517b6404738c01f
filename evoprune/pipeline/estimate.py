"""An estimate of the time until the first token, before the work begins."""

from evoprune.model.cost import estimate_first_token as estimate_seconds
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.view import View
from evoprune.vision.tower import tower_shape

QUESTION = 40  # tokens of a prompt around the video, where the question is not known


def estimate_first_token(engine: Engine, view: View, text: int = QUESTION) -> float | None:
    """Seconds until the first token, roughly; None on CUDA and for a demo model, where it is short.

    Args:
        text: tokens of the prompt around the video.
    """
    if engine.loaded.device != "cpu" or engine.loaded.is_demo:
        return None
    model, encoder = engine.loaded.model, view.encoder
    count, height, width = encoder.grid
    windows = tower_shape(model.model.visual).windows(height, width)
    return estimate_seconds(
        model, [*encoder.layers, encoder.rows], count, windows, engine.prompt_work(encoder.keep, text)
    )
