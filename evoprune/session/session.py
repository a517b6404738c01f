"""A loaded model with its pruning settings, used both for encoding inputs and for answering questions."""

import os
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions, Prompt, Turn
from evoprune.methods import Budget, PruneConfig
from evoprune.model import Cost
from evoprune.session.loading.description import ModelDescription, describe
from evoprune.session.loading.model import LoadedModel, load_model
from evoprune.session.memory import TEXT, check_fits, fitting_pieces, piece_needs
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.prompting import prompt_about
from evoprune.session.published import BUNDLED_CONFIGS
from evoprune.util import brief, counted
from evoprune.video import Plan


@dataclass(frozen=True)
class Session:
    """A loaded model with its pruning settings. Use `load` to create a session.

    Raises:
        UsageError: If the model doesn't support the pruning method.
    """

    loaded: LoadedModel
    pruning: PruneConfig
    load_seconds: float | None = None  # load time in seconds, for reports; None if unknown
    startup_seconds: float | None = None  # time between the start of the process and loading; None if unknown
    process: int = field(
        default_factory=os.getpid, repr=False, compare=False
    )  # ID of the process that created the session

    def __post_init__(self):
        self.loaded.description.check_method(self.pruning.method)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str] | ModelOptions | ModelDescription,
        pruning: PruneOptions,
        *,
        progress: Callable[[int, int], None] | None = None,
        streams: bool = False,
    ) -> Self:
        """Load a model for answering questions. Incompatible pruning methods are rejected before anything is downloaded.

        Args:
            model: The model name, its options, or its description.
            pruning: The budget and the pruning method.
            progress: See `load_model`.
            streams: Whether to reject models and methods that don't support live streams.

        Raises:
            TypeError: If `model` or `pruning` has an unsupported type.
            EvopruneError: If loading fails; see `load_model` and `LoadedModel.check_answers`.
        """
        start = time.perf_counter()
        if not isinstance(pruning, PruneOptions):
            raise TypeError(f"pruning is {brief(pruning)}, not a PruneOptions; PruneOptions() has the defaults")
        config = pruning.config()  # reject invalid settings before looking for the model
        if isinstance(model, str | os.PathLike):
            model = ModelOptions(model)
        if isinstance(model, ModelOptions):
            if streams and model.model in BUNDLED_CONFIGS:  # reject the model before anything is downloaded
                describe(model, local=True).check_streams(config.method)
            model = describe(model)
        if not isinstance(model, ModelDescription):
            raise TypeError(f"model is {brief(model)}, not a name, a ModelOptions or a ModelDescription")
        model.check_method(config.method)
        if streams:
            model.check_streams(config.method)
        loaded = load_model(model, to_answer=True, progress=progress)
        loaded.check_answers()
        return cls(loaded, config, time.perf_counter() - start)

    def __repr__(self) -> str:
        settings = f"method {self.pruning.name!r}, budget {self.pruning.budget.recorded}, seed {self.pruning.seed}"
        return f"<Session {self.loaded.id!r} in {self.loaded.dtype} on {self.loaded.device}: {settings}>"

    def check_process(self) -> None:
        """Raise UsageError in a forked process, where torch would wait forever for threads that only the parent process has."""
        if self.process != os.getpid() and torch.get_num_threads() > 1:
            hint = (
                "load the model in each process; multiprocessing.get_context('spawn') starts processes without forking"
            )
            raise UsageError("the model was loaded before this process was forked", hint)

    def unpruned(self) -> "Session":
        """Return a session with the same model and seed that keeps all visual tokens, as a baseline for comparisons."""
        return replace(self, pruning=PruneConfig.of(Budget.FULL, "none", self.pruning.seed))

    def prompt_columns(self, tokens: int, text: int) -> int | tuple[int, ...]:
        """Return the maximum number of prompt tokens that each language model layer has to keep in its KV cache.

        Args:
            tokens: Number of visual tokens.
            text: Number of text tokens.

        Returns:
            A single number for all layers, or a tuple with one number per layer.
        """
        config = self.loaded.model.config.text_config
        share = self.pruning.budget.largest
        return self.pruning.method.prompt_columns(config.num_hidden_layers, tokens, text, share, config.linear_layers)

    def fitting_prompt(
        self,
        plans: Sequence[Plan],
        question: str,
        options: GenerationOptions,
        kept: int,
        earlier: Sequence[Turn] = (),
    ) -> Prompt:
        """Build the prompt for a question, and check that it fits into the model's context and into memory.

        The prompt contains a placeholder for each of the inputs' visual tokens, including tokens that will be pruned.

        Args:
            kept: Number of visual tokens that the language model will read.
            earlier: The conversation so far.

        Raises:
            UsageError: If the prompt doesn't fit into the model's context.
            OutOfMemory: If the prompt doesn't fit into memory.
            ModelError: If the chat template is unusable.
        """
        loaded = self.loaded
        loaded.check_texts(question, options.system, earlier)
        vision = loaded.model.config.vision_config
        prompt = prompt_about(loaded.tokenizer, vision, plans, question, options.system, options.thinking, earlier)
        loaded.check_context(prompt.text_tokens, kept, options.max_new_tokens)
        self.check_memory(prompt.text_tokens, kept)
        return prompt

    def longest_prompt(
        self,
        plans: Sequence[Plan],
        questions: Sequence[str],
        options: GenerationOptions,
        encoded: Collection[Plan] = (),
    ) -> int:
        """Check that each question fits into context and memory, and return the number of text tokens in the longest prompt.

        Args:
            encoded: The plans of already encoded inputs, whose memory requirements aren't checked again.

        Raises:
            UsageError: If a question doesn't fit into the model's context.
            OutOfMemory: If encoding an input and reading the prompt would need too much memory.
            ModelError: If the chat template is unusable.
        """
        for question in questions:
            self.loaded.check_texts(question, options.system)
        tokenizer, vision = self.loaded.tokenizer, self.loaded.model.config.vision_config
        longest = max(
            prompt_about(tokenizer, vision, plans, asked, options.system, options.thinking).text_tokens
            for asked in questions
        )
        kept = sum(plan.encoder.keep for plan in plans)
        self.loaded.check_context(longest, kept, options.max_new_tokens)
        for plan in plans:
            other_tokens = max(TEXT, longest) + kept - plan.encoder.keep
            if other_tokens > TEXT and not any(plan is each for each in encoded):
                self.fitting_pieces(plan, other_tokens)
        return longest

    def fitting_pieces(self, plan: Plan, other_tokens: int = TEXT) -> list[int]:
        """Return the piece sizes (`piece_needs`) for encoding an input in the available memory, largest first.

        If memory is low, the stored patches of earlier inputs are evicted first.

        Args:
            other_tokens: Number of prompt tokens other than this input's kept tokens.

        Raises:
            OutOfMemory: If there isn't enough memory for the smallest piece size or for the prompt.
        """
        model = self.loaded.model
        encoder = plan.encoder
        prompt = self.prompt_columns(encoder.keep, other_tokens)
        needs = piece_needs(model.config, model.device, encoder, model.dtype.itemsize, prompt)
        frames = f"{counted(plan.sampling.frames, 'frame')} of {plan.width}x{plan.height} pixels"
        kept = f"{frames}, {encoder.keep:,} visual tokens kept"
        if other_tokens > TEXT:
            kept += f", {other_tokens:,} other tokens"
        return fitting_pieces(needs, model.device, plan.name, kept, self.loaded.patches.clear)

    def check_memory(self, text: int, visual: int) -> None:
        """Check that a prompt fits into memory.

        A prompt with at most `TEXT` text tokens always passes, because the check before encoding already covers it.

        Raises:
            OutOfMemory: If the prompt doesn't fit.
        """
        if text <= TEXT:
            return
        model = self.loaded.model
        needed = Cost(model.config).language_bytes(self.prompt_columns(visual, text), model.dtype.itemsize)
        check_fits(self.loaded.device, needed, f"a prompt of {text + visual:,} tokens", "prefill")

    def check_stream_memory(self, plan: Plan) -> None:
        """Check that the state carried over between the windows of a stream fits into memory.

        Raises:
            OutOfMemory: If the state doesn't fit.
        """
        if not plan.encoder.reuse:
            return
        model = self.loaded.model
        _, height, width = plan.encoder.grid
        # The states of two windows are in memory at the same time.
        needed = 2 * Cost(model.config).carried_bytes(height * width, model.dtype.itemsize)
        check_fits(model.device, needed, f"a stream of {plan.width}x{plan.height} pixels", "encode")

    @property
    def device(self) -> torch.device:
        """The device of the vision tower."""
        return self.loaded.model.model.visual.patch_embed.proj.weight.device
