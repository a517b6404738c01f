"""Read a pruned prompt with the language model, and read the tokens of its answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from evoprune.backend import Device, Packing, Quantization, to_device
from evoprune.errors import ModelError, call, not_a_number_error
from evoprune.language import decoder
from evoprune.language.decoder import KVCache
from evoprune.language.pruned import PrunedPrompt
from evoprune.methods import MethodChain, arange_on
from evoprune.model import ANSWER_COLUMNS, HostedVL, without_autocast
from evoprune.vision import Encoded

if TYPE_CHECKING:
    from evoprune.language.hosted import HostedCache
    from evoprune.language.mtp import MtpLayer
    from evoprune.methods import Dropping


class LanguageModel:
    """Runs a loaded model's language model on prompts and generated tokens.

    The layers are implemented in decoder.py for most models. For models with transformers modules, hosted.py is used.

    Args:
        model: A module tree that uses Hugging Face weight names, or a `HostedVL`.
    """

    def __init__(self, model):
        self.model = model
        self._hosted: ModuleType | None = None  # language/hosted.py, if transformers runs the layers
        if isinstance(model, HostedVL):
            from evoprune.language import hosted

            self._hosted = hosted
        self._layers = self._hosted or decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype used for computation, which may differ from the dtype of the stored weights."""
        return self.model.model.language_model.norm.weight.dtype

    @property
    def can_crop(self) -> bool:
        """Whether the KV cache can be cropped to any length.

        With recurrent layers, at most the last few columns can be cropped (see `KVCache`), so callers keep a copy instead.
        """
        if self._hosted:
            return self._hosted.can_crop(self.model)
        return not decoder.has_deltas(self.model)

    @property
    def can_capture(self) -> bool:
        """Whether decoding steps can be captured in a CUDA graph, if the device supports graphs."""
        from evoprune.language import static

        return static.can_step(self.model)

    @property
    def reads_ids(self) -> bool:
        """Whether some layers require token IDs in addition to embeddings, as in Qwen4-Exp."""
        return self._hosted is not None and self._hosted.reads_ids(self.model)

    @property
    def can_draft(self) -> bool:
        """Whether drafted tokens can be read in the same pass as the latest token, and dropped if they are rejected.

        Models run by transformers are excluded: their layers round several columns differently than a single one, and quantized
        layers and routers would turn such differences into larger ones.
        """
        return not self._hosted and Device(self.model.model.language_model.norm.weight.device).reads_drafts

    @property
    def reads_drafts_exactly(self) -> bool:
        """Whether a few tokens read in one pass have exactly the same logits as if each was read alone."""
        return Quantization.computes_few_exactly(self.model)

    @property
    def runs_modules(self) -> bool:
        """Whether the layers run as transformers modules, so results are rounded exactly as in transformers."""
        device = self.model.model.language_model.norm.weight.device
        return self._hosted is not None and self._hosted.run_for(self.model, device) is self._hosted.run_modules

    @property
    def answer_window(self) -> int | None:
        """Number of columns that an answer token attends to, including itself, or None for all columns."""
        return self.model.config.text_config.sliding_window if self._hosted else None

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up the input embeddings, `[n, hidden]`, for token IDs, int64 `[n]`.

        Raises:
            ModelError: If the model has no embedding for a token ID.
        """
        embed = self.model.model.language_model.embed_tokens
        if len(ids) and ids.max() >= len(embed.weight):
            problem = f"the tokenizer produced token {int(ids.max())}, but the model has only {len(embed.weight):,}"
            raise ModelError(problem, "use the tokenizer and the weights of the same model", stage="prefill")
        embeds = embed(to_device(ids, embed.weight.device))
        return embeds.to(self.dtype)  # the embedding matrix may still have its stored dtype

    def new_cache(self, columns: int | Sequence[int]) -> "KVCache | HostedCache":
        """Return an empty KV cache with room for a prompt and a typical answer.

        Args:
            columns: Number of prompt columns, either a single number for all layers or one number per layer.
        """
        if self._hosted:
            return self._hosted.HostedCache(self.model)
        if isinstance(columns, int):
            return KVCache(self.model, columns + ANSWER_COLUMNS)
        return KVCache(self.model, [n + ANSWER_COLUMNS for n in columns])

    def mtp_layer(self) -> "MtpLayer | None":
        """Return the model's layer for multi-token prediction with an empty KV cache, or None if the model has no such layer."""
        if not hasattr(self.model, "mtp"):
            return None
        from evoprune.language.mtp import MtpLayer

        return MtpLayer(self.model, self.embed)

    def forward(self, *args, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Read new columns and return the final hidden states of the last columns. See `decoder.forward` for other arguments.

        Args:
            ids: int64 `[columns]` on the CPU, the token IDs of the new columns, which the cache records. Some models require them
                in addition to embeddings (see `hosted.reads_ids`).
        """
        return self._layers.forward(self.model, *args, ids=ids, **kwargs)

    def logits(self, *args, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Read new columns and return the next-token logits after each of the last columns, float32 `[last, vocabulary]`.

        Takes the same arguments as `forward`.
        """
        return self.output(self.forward(*args, ids=ids, **kwargs))

    @torch.inference_mode()
    @without_autocast()
    def output(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the next-token logits, float32 `[n, vocabulary]`, for final hidden states, `[n, hidden]`."""
        return self.model.lm_head(hidden).float()

    def prefill(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        next_position: int,
        cache: "KVCache | HostedCache | None" = None,
        sizes: torch.Tensor | None = None,
        dropping: "Dropping | None" = None,
        deepstack: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
    ) -> "PrefillState":
        """Read a prompt, or the rest of a prompt whose beginning is already in the KV cache.

        See `decoder.forward` for the remaining arguments and the exceptions.

        Args:
            next_position: M-RoPE position of the first generated token, used only for decoding. In Qwen models, it is the largest
                position in the *unpruned* prompt plus one.
            cache: The KV cache of the preceding columns. The new columns are added in place. None starts a new prompt.
            ids: Token IDs of the new columns (see `forward`).
        """
        columns = len(inputs_embeds)
        given = {}
        if dropping is not None:
            columns = dropping.columns
            given["dropping"] = dropping
        if cache is None:
            cache = self.new_cache(columns)
        Packing.of(self.model).begin_pass()
        hidden = self.forward(inputs_embeds, positions, cache, sizes, deepstack=deepstack, ids=ids, **given)
        return PrefillState(self, cache, self.output(hidden)[0], hidden, cache.length, next_position, dropping)

    def dropping_for(
        self, method: MethodChain, budget: float, read: Sequence[Encoded], prompt: PrunedPrompt
    ) -> "Dropping | None":
        """Return a `Dropping` for a pruned prompt, or None if the pruning method doesn't drop tokens inside the language model.

        Args:
            method: The pruning method.
            budget: The pruning budget, as a fraction of the visual units.
            read: The prompt's encoded inputs, in order.
            prompt: The prompt after pruning.
        """
        tokens = sum(len(each.kept) for each in read)
        config = self.model.config.text_config
        if method.language_work(config.num_hidden_layers, tokens, budget, config.linear_layers) is None:
            return None
        pairs = []
        inside = []
        before = 0
        for each in read:
            ((count, height, width),) = each.grids
            units = each.kept_here
            pairs.append(units // (height * width) + before)
            row = units // width % height
            column = units % width
            inside.append(torch.stack([row.float() / height, column.float() / width], 1))
            before += count
        places = prompt.visual.nonzero()[:, 0]
        share = method.language_share(budget)
        inner = method.language
        return call(
            inner.package, inner.reading, self.model, share, prompt.embeds, places, torch.cat(pairs), torch.cat(inside)
        )


@dataclass
class PrefillState:
    """The language model state after reading a prompt and part of the answer. Created by `LanguageModel.prefill`."""

    language: LanguageModel
    # Keys and values of the prompt and the answer tokens read so far. During decoding, the last of these may be drafted tokens that
    # are later rejected.
    cache: "KVCache | HostedCache"
    logits: torch.Tensor  # float32 `[vocabulary]`, next-token logits after the cached columns
    hidden: (
        torch.Tensor
    )  # `[n, hidden]`, final hidden states of the last cached columns, which were read in the latest pass
    columns: int  # number of prompt columns in the cache
    next_position: int  # M-RoPE position of the first generated token, on all three axes
    dropping: "Dropping | None" = None  # records which tokens were dropped while reading the prompt
    prompt_ids: torch.Tensor | None = None  # int64 `[L]`, token IDs of the unpruned prompt, for the repetition penalty

    @property
    def answer_columns(self) -> int:
        """Number of answer tokens in the cache."""
        return self.cache.length - self.columns

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read `n` more answer tokens, int64 `[n]`, and return the logits after each token, float32 `[n, vocabulary]`."""
        positions = (arange_on(len(ids), "cpu") + self.next_position + self.answer_columns).expand(3, -1)
        embeds = self.language.embed(ids)
        Packing.of(self.language.model).begin_pass()
        window = self.language.answer_window
        given = {"window": window} if window is not None else {}
        with Quantization.decoding():
            hidden = self.language.forward(embeds, positions, self.cache, last=len(ids), ids=ids, **given)
            logits = self.language.output(hidden)
        self.hidden, self.logits = hidden, logits[-1]
        return logits

    def crop(self, tokens: int) -> None:
        """Drop all answer tokens after the first `tokens` tokens from the cache. See `KVCache.crop`."""
        self.hidden = self.hidden[: max(0, len(self.hidden) - (self.answer_columns - tokens))]
        self.cache.crop(self.columns + tokens)

    @torch.inference_mode()
    def logits_along(self, ids: torch.Tensor, one_by_one: bool = False) -> torch.Tensor:
        """Return the logits that predict each token of a given answer (teacher forcing).

        All answer tokens except the last one are added to the KV cache.

        Args:
            ids: int64 `[n]`, the answer token IDs.
            one_by_one: Whether to run a separate forward pass for each token, as in decoding, instead of a single pass for all
                tokens.

        Returns:
            float32 `[n, vocabulary]`.

        Raises:
            ModelError: If a logit is NaN or infinite.
        """
        logits = [self.logits[None]]
        if len(ids) > 1:
            step = 1 if one_by_one else len(ids)
            logits += [self.read(piece) for piece in ids[:-1].split(step)]
        logits = torch.cat(logits)
        if not logits.amax(1).isfinite().all():
            raise not_a_number_error("generate")
        return logits

    def graph_logits_along(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the logits after each token of a given answer, `[n, vocabulary]`, computed using a CUDA graph.

        Requires `LanguageModel.can_capture`. Exceptions raised during graph capture propagate unchanged.

        Args:
            ids: int64 `[n]`, the answer token IDs.
        """
        from evoprune.language import static

        return static.logits_along(self.language.model, self.cache, self.next_position, ids)
