"""Read a pruned prompt, then generate an answer token by token."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch

from evoprune.backend import Device, Packing, Quantization, to_device
from evoprune.errors import ModelError, call, callback_errors, not_a_number_error
from evoprune.language import decoder, hosted, static
from evoprune.language.decoder import KVCache
from evoprune.language.hosted import HostedCache
from evoprune.language.lookup import Lookup
from evoprune.language.pruned import PrunedPrompt
from evoprune.language.settings import GenerationOptions
from evoprune.language.static import StaticCache, best_of
from evoprune.methods import Dropping, MethodChain, arange_on
from evoprune.model import ANSWER_COLUMNS, HostedVL
from evoprune.util import generator_seed
from evoprune.vision import Encoded


class LanguageModel:
    """Runs a loaded model's language model on prompts and generated tokens.

    The layers are implemented in decoder.py for most models. For models with transformers modules, hosted.py is used.

    Args:
        model: A module tree that uses Hugging Face weight names, or a `HostedVL`.
    """

    def __init__(self, model):
        self.model = model
        self._hosted = isinstance(model, HostedVL)
        self._layers = hosted if self._hosted else decoder

    @property
    def dtype(self) -> torch.dtype:
        """The dtype used for computation, which may differ from the dtype of the stored weights."""
        return self.model.model.language_model.norm.weight.dtype

    @property
    def can_crop(self) -> bool:
        """Whether the KV cache can be cropped. Recurrent layers don't support cropping, so callers keep a copy instead."""
        return not self._hosted or hosted.can_crop(self.model)

    @property
    def can_capture(self) -> bool:
        """Whether decoding steps can be captured in a CUDA graph, if the device supports graphs."""
        return static.can_step(self.model)

    @property
    def reads_ids(self) -> bool:
        """Whether some layers require token IDs in addition to embeddings, as in Qwen4-Exp."""
        return self._hosted and hosted.reads_ids(self.model)

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
        return self._hosted and hosted.run_for(self.model, device) is hosted.run_modules

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

    def new_cache(self, columns: int | Sequence[int]) -> KVCache | HostedCache:
        """Return an empty KV cache with room for a prompt and a typical answer.

        Args:
            columns: Number of prompt columns, either a single number for all layers or one number per layer.
        """
        if self._hosted:
            return HostedCache(self.model)
        if isinstance(columns, int):
            return KVCache(self.model, columns + ANSWER_COLUMNS)
        return KVCache(self.model, [n + ANSWER_COLUMNS for n in columns])

    def forward(self, *args, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Read new columns and return the final hidden states of the last columns. See `decoder.forward` for other arguments.

        Args:
            ids: int64 `[columns]`, the token IDs of the new columns, which some models require in addition to embeddings (see
                `hosted.reads_ids`).
        """
        return self._layers.forward(self.model, *args, **kwargs, **self._given(ids))

    def logits(self, *args, ids: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
        """Read new columns and return the next-token logits after each of the last columns (see `decoder.logits`).

        Takes the same arguments as `forward`.
        """
        return self._layers.logits(self.model, *args, **kwargs, **self._given(ids))

    def _given(self, ids: torch.Tensor | None) -> dict[str, torch.Tensor | None]:
        return {"ids": ids} if self.reads_ids else {}

    def prefill(
        self,
        inputs_embeds: torch.Tensor,
        positions: torch.Tensor,
        next_position: int,
        cache: KVCache | HostedCache | None = None,
        sizes: torch.Tensor | None = None,
        dropping: Dropping | None = None,
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
        after = self.logits(inputs_embeds, positions, cache, sizes, deepstack=deepstack, ids=ids, **given)[0]
        return PrefillState(self, cache, after, next_position, dropping)

    def dropping_for(
        self, method: MethodChain, budget: float, read: Sequence[Encoded], prompt: PrunedPrompt
    ) -> Dropping | None:
        """Return a `Dropping` for a pruned prompt, or None if the pruning method doesn't drop tokens inside the language model.

        Args:
            method: The pruning method.
            budget: The pruning budget, as a fraction of the visual units.
            read: The prompt's encoded inputs, in order.
            prompt: The prompt after pruning.
        """
        tokens = sum(len(each.kept) for each in read)
        if method.language_work(self.model.config.text_config.num_hidden_layers, tokens, budget) is None:
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
    cache: KVCache | HostedCache  # keys and values of the prompt and the answer tokens read so far
    logits: torch.Tensor  # float32 `[vocabulary]`, next-token logits after the cached columns
    next_position: int  # M-RoPE position of the first generated token, on all three axes
    dropping: Dropping | None = None  # records which tokens were dropped while reading the prompt
    prompt_ids: torch.Tensor | None = None  # int64 `[L]`, token IDs of the unpruned prompt, for the repetition penalty
    # Answer tokens in the cache. During decoding, the last of these may be drafted tokens that are later rejected.
    answer: list[int] = field(default_factory=list)
    _drafted: torch.Tensor | None = None  # float32 `[n, vocabulary]`, logits after the last n tokens of `answer`
    _steps: StaticCache | None = None  # contains all other answer tokens while a CUDA graph is decoding
    # Identifies this answer to the static cache. It must not reference the model.
    _holder: object = field(default_factory=object)

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Read `n` more answer tokens, int64 `[n]`, and return the logits after each token, float32 `[n, vocabulary]`."""
        positions = (arange_on(len(ids), "cpu") + self.next_position + len(self.answer)).expand(3, -1)
        embeds = self.language.embed(ids)
        Packing.of(self.language.model).begin_pass()
        window = self.language.answer_window
        given = {"window": window} if window is not None else {}
        with Quantization.decoding():
            logits = self.language.logits(embeds, positions, self.cache, last=len(ids), ids=ids, **given)
        self.answer += ids.tolist()
        self.logits = logits[-1]
        return logits

    def decode(
        self, ids: Sequence[int], left: int, pick: Callable[..., int | None], lookup: Lookup | None = None
    ) -> int:
        """Generate the next answer token. It is safe to call this method again after an exception.

        On CUDA devices, the forward pass runs as a CUDA graph if possible (see language/static.py).

        Args:
            ids: Answer token IDs so far (at least one).
            left: Maximum number of tokens that can still be added to the answer.
            pick: Chooses a token from the logits. It also receives the result of `best_of` for these logits, if already known. With
                `drafted=True`, it returns None if rounding errors could affect the choice.
            lookup: Drafts tokens to read together with the latest token. Requires a croppable cache.
        """
        token = None
        last = len(ids) - 1
        with callback_errors() as passing:
            try:
                if self._steps is None and len(self.answer) == last:
                    self._steps = static.begin(
                        self.language.model, self._holder, self.cache, self.next_position + last, len(ids), left
                    )
                if self._steps is not None:
                    token = self._steps.following(self.language.model, self._holder, ids[-1], passing(pick))
            except Exception as problem:  # graph capture and the captured modules can raise anything
                static.give_up(self.language.model, problem)
        if token is None:
            self._steps = None
            if lookup is not None:
                token = self._decode_drafted(ids, left, pick, lookup)
        if token is None:
            if missing := ids[len(self.answer) :]:
                self._read_ids(missing)
            token = pick(self.logits)
        return token

    def _decode_drafted(
        self, ids: Sequence[int], left: int, pick: Callable[..., int | None], lookup: Lookup
    ) -> int | None:
        """Generate the next token using a pass over drafted tokens.

        Returns:
            The token, or None if no tokens were drafted or rounding errors could affect the choice. If None is returned, `answer`
            doesn't include the latest token.
        """
        last = len(ids) - 1
        if self._drafted is None or self.answer[last : last + 1] != [ids[-1]]:  # the latest token wasn't drafted
            if self._drafted is not None:
                lookup.reject(len(self._drafted) - 1 - (len(self.answer) - last))
            self._drop_drafted(min(last, len(self.answer)))
            draft = lookup.draft(ids, left - 1)
            if not draft:
                return None
            missing = ids[len(self.answer) :]
            self._drafted = self._read_ids([*missing, *draft])[len(missing) - 1 :]
        token = pick(self._drafted[last - len(self.answer)], drafted=True)
        if token is None:
            self._drop_drafted(last)
        return token

    def _drop_drafted(self, length: int) -> None:
        """Crop the KV cache to the prompt and the first `length` answer tokens."""
        self.cache.crop(self.cache.length - (len(self.answer) - length))
        del self.answer[length:]
        self._drafted = None

    def _read_ids(self, ids: Sequence[int]) -> torch.Tensor:
        return self.read(torch.tensor(ids, dtype=torch.int64, device="cpu"))

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
        return static.logits_along(self.language.model, self.cache, self.next_position, ids)


class TokenLogprobs(NamedTuple):
    """Natural log probabilities of a generated token and its alternatives.

    They are computed from the raw logits, before applying temperature, penalties, top-k, and top-p.
    """

    chosen: float  # log probability of the chosen token
    top: list[tuple[int, float]]  # most probable token IDs and their log probabilities, in descending order


def token_logprobs(logits: torch.Tensor, token: int, most: int) -> TokenLogprobs:
    """Return the log probabilities of a token and the `most` most probable tokens. `logits` is float32 `[vocabulary]`."""
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(min(most, len(logprobs)))
    chosen, *values = torch.cat([logprobs[token][None], top.values]).tolist()
    return TokenLogprobs(chosen, list(zip(top.indices.tolist(), values, strict=True)))


class TokenConstraint(Protocol):
    """Constrains the tokens of a single answer. `mask` is called before choosing each token, and `advance` afterwards."""

    def mask(self, size: int) -> torch.Tensor | None:
        """Return a mask of the allowed token IDs, bool `[size]` on the CPU and never all False, or None to allow all tokens."""

    def advance(self, token: int) -> None:
        """Record the chosen token. Not called for end tokens."""

    @property
    def complete(self) -> bool:
        """Whether the answer is complete, so only an end token can follow."""


class TokenStream(Iterator[int]):
    """Iterator that lazily generates the token IDs of an answer.

    The same `seed` always produces the same answer.

    Args:
        state: The model's state after reading the prompt, which can be used for only one answer.
        eos_ids: IDs of the tokens that end the answer, which are not yielded.
        constraint: Constrains the answer tokens, and can be used for only one answer. None allows all tokens.

    Raises:
        ModelError: During iteration, if a logit is NaN or infinite. Exceptions raised by the constraint propagate unchanged.
    """

    def __init__(
        self,
        state: PrefillState,
        settings: GenerationOptions,
        eos_ids: Iterable[int],
        seed: int = 0,
        constraint: TokenConstraint | None = None,
    ):
        # "stop" if the model ended its turn or the constraint allows no more tokens, "length" if the limit was reached, or None if
        # the answer is incomplete.
        self.finish_reason: str | None = None
        self.ids: list[int] = []  # tokens yielded so far
        self.logprobs: list[TokenLogprobs] = []  # one entry per token in `ids`, if log probabilities were requested
        self._state = state
        self._settings = settings
        self._latest_logprobs: TokenLogprobs | None = None  # log probabilities of the latest token
        self._eos_ids = frozenset(eos_ids)
        self._constraint = constraint
        penalizes = settings.repetition_penalty not in (None, 1)
        self._seen: set[int] = set()  # prompt and answer tokens
        if penalizes and state.prompt_ids is not None:
            self._seen.update(state.prompt_ids.tolist())
        self._greedy = settings.temperature == 0 and not penalizes
        self._lookup: Lookup | None = None
        if self._greedy and settings.logprobs is None and state.prompt_ids is not None and state.language.can_draft:
            language = state.language
            self._lookup = Lookup(state.prompt_ids, None if language.reads_drafts_exactly else language.dtype)
        # Use a CPU generator, so that a seed produces the same random numbers on all devices.
        self._random = torch.Generator().manual_seed(generator_seed(seed))

    @torch.inference_mode()
    def __next__(self) -> int:
        left = self._settings.max_new_tokens - len(self.ids)
        if self.finish_reason is None and self._constraint is not None and self._constraint.complete:
            self.finish_reason = "stop"
        if self.finish_reason is None and not left:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            raise StopIteration
        if self.ids:  # the model doesn't read the latest token until another token is requested
            token = self._state.decode(self.ids, left, self._pick, self._lookup)
        else:
            token = self._pick(self._state.logits)
        if token in self._eos_ids:
            self.finish_reason = "stop"
            raise StopIteration
        self.ids.append(token)
        self._seen.add(token)
        if self._latest_logprobs is not None:
            self.logprobs.append(self._latest_logprobs)
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _pick(self, logits: torch.Tensor, best: torch.Tensor | None = None, drafted: bool = False) -> int | None:
        """Choose the next token from its logits.

        Args:
            logits: float32 `[vocabulary]`.
            best: The result of `best_of`, if already known.
            drafted: Whether the logits are from a pass over drafted tokens. In that case, the result is None if rounding errors
                could affect the choice.
        """
        token = self._choose(logits, best, drafted)
        if self._settings.logprobs is not None:
            self._latest_logprobs = token_logprobs(logits, token, self._settings.logprobs)
        return token

    def _choose(self, logits: torch.Tensor, best: torch.Tensor | None, drafted: bool) -> int | None:
        raw = logits
        if self._constraint is not None:
            mask = self._constraint.mask(len(logits))  # runs while a GPU is still computing the logits
            if mask is not None:
                best = None
                # Subtract instead of overwriting, so that NaN and infinite logits are still detected.
                logits = logits.where(to_device(mask, logits.device), logits - torch.inf)
        if self._greedy:
            if best is None:
                best = best_of(logits)
            token, finite = best.tolist()
            self._check(finite)
            return None if drafted and self._lookup.is_near_tie(raw, logits) else token
        logits = logits.cpu()
        self._check(logits.max().isfinite())  # the maximum is NaN if any logit is
        return choose(logits, self._settings, self._random, self._seen)

    def _check(self, finite: bool | torch.Tensor) -> None:
        if not finite:
            raise not_a_number_error("generate" if self.ids else "prefill")


def choose(
    logits: torch.Tensor, settings: GenerationOptions, random: torch.Generator, seen: Collection[int] = ()
) -> int:
    """Choose the next token: the most probable token if the temperature is 0; otherwise, a sampled token.

    Args:
        logits: float32 `[vocabulary]`.
        settings: The sampling options.
        random: A random generator on the CPU.
        seen: Prompt and answer token IDs that the repetition penalty applies to.

    Returns:
        The token ID.
    """
    if settings.repetition_penalty not in (None, 1):
        logits = penalized(logits, settings.repetition_penalty, seen)
    if settings.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits.cpu(), settings), 1, generator=random))


def penalized(logits: torch.Tensor, penalty: float, seen: Collection[int]) -> torch.Tensor:
    """Apply a repetition penalty (arXiv 1909.05858) like transformers. Penalties above 1 lower the logits of seen tokens."""
    ids = to_device(torch.tensor([*seen], dtype=torch.int64, device="cpu"), logits.device)
    scores = logits[ids]
    return logits.index_put((ids,), torch.where(scores < 0, scores * penalty, scores / penalty))


def probabilities(logits: torch.Tensor, settings: GenerationOptions) -> torch.Tensor:
    """Apply temperature, top-k, and nucleus sampling (arXiv 1904.09751), and return the sampling probabilities.

    Returns:
        The unnormalized probabilities, float64 `[vocabulary]`.
    """
    # Subtract the largest logit first, so that dividing by a very low temperature cannot overflow.
    logits = logits.double()
    logits = (logits - logits.max()) / settings.temperature
    if 0 < settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], float("-inf"))
    shares = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        # Keep a token if all more probable tokens have a total probability below top_p. The first token is always kept.
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(0, order, ordered)
    return shares
