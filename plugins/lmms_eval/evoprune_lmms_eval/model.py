"""An lmms-eval model that runs Qwen2.5-VL or Qwen2-VL with evoprune.

    python -m lmms_eval --model evoprune_qwen2_5_vl --tasks videomme --log_samples --output_path runs \\
        --model_args pretrained=Qwen/Qwen2.5-VL-3B-Instruct,budget=0.1,method=evoprune

Consecutive questions about the same videos and images share an encoding. Evoprune's measurements are added to each sample's
`token_counts`.
"""

import hashlib
import os
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from PIL import Image
from tqdm import tqdm

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.report import Report
from evoprune.session import EncodedInputs, ModelOptions, PruneOptions, Session
from evoprune.signatures import takes
from evoprune.util import from_keywords, without_tags
from evoprune.video import SamplingOptions, temporary_folder
from evoprune.video_qa import VideoQA

HINT = "evoprune_qwen2_5_vl answers generate_until about one video per question"
KINDS = (ModelOptions, PruneOptions, SamplingOptions, GenerationOptions)
OPTIONS = (*ModelOptions.LOADING, *PruneOptions.PRUNING, *SamplingOptions.FILES, *GenerationOptions.ANSWER)


@dataclass
class Measured(TokenCounts):
    measured: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | self.measured


class EvoPruneQwen25VL(lmms):
    """A model for lmms-eval, which passes its `model_args` entries as arguments.

    Args:
        pretrained: A hub ID, a local folder, or `demo`.
        system_prompt: Replaces the model's own system prompt.
        pictures: Whether questions may contain images or several inputs. Images are pruned like videos.
        batch_size: Must be 1.
        max_batch_size: Ignored.
        options: Options for `VideoQA.load`, `encode`, and `ask`, such as `budget`, `method`, and `fps`. Task settings override
            them.

    Raises:
        EvopruneError: If `VideoQA.load` fails, `batch_size` isn't 1, or there is more than one process.
        TypeError: If an option is unknown.
    """

    @takes(*KINDS, names=OPTIONS)
    def __init__(
        self,
        pretrained: str = "Qwen/Qwen2.5-VL-3B-Instruct",
        system_prompt: str | None = None,
        pictures: bool | str = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **options,
    ):
        super().__init__()
        if str(batch_size) != "1":
            raise UsageError(f"batch_size {batch_size}: videos are answered one at a time", "leave it at 1")
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UsageError("this model runs in one process", "start one run per GPU, each with its own tasks")
        # `max_new_tokens` is the limit for tasks without their own limit.
        given = {"model": pretrained, "system": system_prompt, "max_new_tokens": 128, **options}
        model, pruning, self._sampling, self._generation = from_keywords(given, *KINDS)
        self._qa = VideoQA(Session.load(model, pruning))
        self._pictures = str(pictures).lower() in ("true", "1")
        self._inputs: EncodedInputs | None = None  # encoded inputs of the most recent question
        self._shown: list[str] | None = None  # paths of these inputs; in-memory inputs are identified by their contents

    def generate_until(self, requests) -> list[GenerationResult]:
        """Return the answers in the order of the requests."""
        return list(tqdm(self.answers(requests), total=len(requests), desc="evoprune"))

    def pruned(self, **options) -> "EvoPruneQwen25VL":
        """Return a model with the same weights and other pruning options, such as `budget` and `method`.

        Raises:
            EvopruneError: If an option is wrong, or the model doesn't support the method.
            TypeError: If an option is unknown.
        """
        other = copy(self)
        (pruning,) = from_keywords(options, PruneOptions)
        other._qa = VideoQA(replace(self._qa.session, pruning=pruning.config()))
        other._inputs = other._shown = None
        return other

    def loglikelihood(self, requests):
        raise NotImplementedError(HINT)

    def generate_until_multi_round(self, requests):
        raise NotImplementedError(HINT)

    def answers(self, requests) -> Iterator[GenerationResult]:
        """Yield the answers in the order of the requests, each as soon as it is complete."""
        for request in requests:
            question, settings, doc_to_visual, doc_id, task, split = request.args
            visuals = doc_to_visual(self.task_dict[task][split][doc_id])
            with temporary_folder() as folder:
                paths = _files(visuals, folder) if self._pictures else [_only_video(visuals)]
                contents = [path.removeprefix(folder) for path in paths]
                if self._shown != contents:
                    self._inputs = self._shown = None  # free memory before encoding the next inputs
                    self._inputs, self._shown = self._qa.encode(paths, **vars(self._sampling)), contents
            text, report = self._answer(without_tags(question), settings)
            self.cache_hook.add_partial("generate_until", (question, settings), text)
            counts = ("visual_tokens_in", "visual_tokens_kept", "encoder_live_share")
            facts = {name: getattr(report.pruning, name) for name in counts}
            facts |= {"time_ms": asdict(report.time_ms), "warnings": report.warnings}
            measured = Measured(input_tokens=report.tokens.prompt, output_tokens=report.tokens.new, measured=facts)
            yield GenerationResult(text, measured)

    def _answer(self, question: str, settings: dict[str, Any]) -> tuple[str, Report]:
        """Answer a question. Returns the answer text up to the task's first stop word, and the report."""
        if settings.get("num_beams", 1) > 1:
            raise UsageError("beam search is not supported", "set num_beams to 1 in the task's generation_kwargs")
        sampled = settings.get("do_sample", True)
        until = settings.get("until") or []
        if isinstance(until, str):
            until = [until]
        # Tasks state zeros that mean nothing, such as a top_p of 0, but a temperature of 0 and a top_k of 0 have a meaning.
        names = ("max_new_tokens", "top_p", "repetition_penalty")
        stated = {name: settings[name] for name in names if settings.get(name)}
        stated |= {name: settings[name] for name in ("temperature", "top_k") if settings.get(name) is not None}
        if not sampled:
            stated["temperature"] = 0.0
        options = replace(self._generation, **stated)
        answer = self._inputs.ask(question, **vars(options))
        for _ in answer:
            said = answer.report.answer
            if ends := [said.index(stop) for stop in until if stop in said]:
                answer.close()
                return said[: min(ends)], answer.report
        return answer.text, answer.report


def _only_video(visuals: list) -> str:
    """Return the path of a question's only video.

    Raises:
        UsageError: If the question contains images, or doesn't contain exactly one video.
    """
    if len(visuals) != 1 or not isinstance(visuals[0], str | os.PathLike):
        kinds = ", ".join(type(visual).__name__ for visual in visuals) or "none"
        raise UsageError(f"this task shows {kinds}, not one video file", f"{HINT}; pictures=true allows images")
    return os.fspath(visuals[0])


def _files(visuals: list, folder: str) -> list[str]:
    """Return the paths of a question's videos and images.

    In-memory images are written to files in `folder`, named after the hash of their contents.

    Raises:
        UsageError: If an input is neither a video nor an image, or there are no inputs.
    """
    paths = []
    for visual in visuals:
        if isinstance(visual, str | os.PathLike):
            paths.append(os.fspath(visual))
        elif isinstance(visual, Image.Image):
            content = BytesIO()
            if "transparency" in visual.info:
                visual = visual.convert("RGBA")
            visual.save(content, "TIFF", exif=b"")
            paths.append(os.path.join(folder, f"{hashlib.sha256(content.getvalue()).hexdigest()}.tiff"))
            Path(paths[-1]).write_bytes(content.getvalue())
        else:
            raise UsageError(f"this task shows {type(visual).__name__}, not a video or an image", HINT)
    if not paths:
        raise UsageError("this task shows nothing", HINT)
    return paths
