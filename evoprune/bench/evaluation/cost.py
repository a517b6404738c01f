"""What answering a question costs, in operations at the dimensions of Qwen2.5-VL-3B.

The rows that each layer of the run's own tower computed are stretched to the 3B's 32 layers by relative depth (`stretched`), and
so are the prompt's lengths where they differ from layer to layer. Scoring and merging, a few percent of the tower, are left out.
"""

from evoprune.model.cost import prefill_flop, stretched, tower_flop
from evoprune.report import Report
from evoprune.session.answering import EncodedInputs
from evoprune.session.loading.find import describe_model
from evoprune.session.loading.model import LoadedModel
from evoprune.session.options import ModelOptions
from evoprune.vision.tower import tower_geometry

COST_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
NOTE = (
    f"operations: tower and prefill at the dimensions of {COST_MODEL.rpartition('/')[2]}, from the true rows of each layer, by "
    "relative depth, and the true length of the prompt"
)


class Cost:
    def __init__(self, loaded: LoadedModel, encoded: EncodedInputs):
        config = describe_model(ModelOptions(COST_MODEL)).config
        vision, (grids, height, width) = config.vision_config, encoded.plan.grid
        windows = tower_geometry(loaded.model.model.visual, height, width).windows
        entered = [rows for _, rows in encoded.report.pruning.layers]
        rows = [*stretched(entered, vision.depth), encoded.report.pruning.encoder_rows]
        self._text = config.text_config
        self._tower = tower_flop(vision, rows, grids, windows) / 1e12

    def of(self, report: Report) -> dict[str, float]:
        """The cost of an answered question, as fields of a sample. `tflop`: 10^12 multiplications and additions."""
        pruning, tokens, depth = report.pruning, report.tokens, self._text.num_hidden_layers
        read = [count for _, count in pruning.language_layers or [(0, pruning.visual_tokens_kept)]]
        work = pruning.language_work or [[layer, *[count] * 3] for layer, count in pruning.language_layers or []]
        lengths = [[tokens.text + count for count in counts] for _, *counts in stretched(work, depth)] if work else None
        prefill = prefill_flop(self._text, lengths or tokens.prompt) / 1e12
        return {
            "units": pruning.visual_tokens_in,
            "tokens": pruning.visual_tokens_kept,
            "layer_tokens": sum(read) / len(read),
            "kept_share": pruning.kept_ratio,
            "live_share": pruning.encoder_live_share,
            "prompt": report.tokens.prompt,
            "tflop_3b": self._tower + prefill,
            "tflop_3b_tower": self._tower,
            "tflop_3b_prefill": prefill,
        }
