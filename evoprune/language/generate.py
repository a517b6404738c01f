"""From a pruned prompt to text: prefill, decoding token by token, streamed text."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, repeat, takewhile
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from tokenizers.decoders import DecodeStream

from evoprune.backend import begin_pass, to_device
from evoprune.errors import EvopruneError, ModelError, call
from evoprune.language import decoder, hosted, static
from evoprune.language.decoder import KVCache
from evoprune.language.hosted import HostedCache
from evoprune.language.prompt import THOUGHTS, Tokenizer, opens_thoughts
from evoprune.language.pruned import PrunedPrompt
from evoprune.language.settings import GenerationOptions
from evoprune.language.static import StaticCache, best_of
from evoprune.methods import Dropping, MethodChain, arange_on, generator_seed
from evoprune.model import ANSWER_COLUMNS, HostedVL, not_a_number_error
from evoprune.vision import Encoded


def embed_ids(model, ids: torch.Tensor) -> torch.Tensor:
    """Return the embeddings `[n, hidden]` of token ids, int64 `[n]`.

    Raises ModelError: the model has no embedding for one of them.
    """
    embed = model.model.language_model.embed_tokens
    norm = model.model.language_model.norm
    if len(ids) and ids.max() >= len(embed.weight):
        problem = f"the tokenizer makes token {int(ids.max())}, and the model knows {len(embed.weight):,}"
        raise ModelError(problem, "take tokenizer and weights from the same model", stage="prefill")
    embeds = embed(to_device(ids, embed.weight.device))
    return embeds.to(norm.weight.dtype)  # embeddings may stay as their file has them


def dropping_for(
    model, method: MethodChain, budget: float, read: Sequence[Encoded], prompt: PrunedPrompt
) -> Dropping | None:
    """Return what leaves while a pruned prompt is read; None where the method lets nothing leave inside the language model.

    `method`, `budget`: as the user named them; `read`: the tokens of each input of the prompt.
    """
    tokens = sum(len(each.kept) for each in read)
    if method.language_work(model.config.text_config.num_hidden_layers, tokens, budget) is None:
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
    return call(inner.package, inner.reading, model, share, prompt.embeds, places, torch.cat(pairs), torch.cat(inside))


@dataclass
class PrefillState:
    """A prompt that was read, and as much of one answer to it: the language model as `TokenStream` needs it. Made by `prefill`."""

    model: Any
    cache: KVCache | HostedCache  # keys and values of the prompt and of the tokens of the answer that are read
    logits: torch.Tensor  # float32 `[vocabulary]`, of the token after what the cache holds
    next_position: int  # M-RoPE position of the first generated token, the same in time, height and width
    dropping: Dropping | None = None  # what left while the prompt was read
    prompt_ids: torch.Tensor | None = None  # int64 `[L]`, of the unpruned prompt; a repetition penalty needs them
    answer: list[int] = field(default_factory=list)  # tokens of the answer that are in the cache
    _steps: StaticCache | None = None  # where the others are
    _holder: object = field(
        default_factory=object
    )  # by which that knows whose answer it has; it must not hold the model

    def read(self, ids: torch.Tensor) -> torch.Tensor:
        """Reads further tokens of the answer, int64 `[n]`; the logits after each of them, float32 `[n, vocabulary]`."""
        positions = (arange_on(len(ids), "cpu") + self.next_position + len(self.answer)).expand(3, -1)
        embeds = embed_ids(self.model, ids)
        begin_pass(self.model)
        logits = layers_of(self.model).logits(self.model, embeds, positions, self.cache, last=len(ids))
        self.answer += ids.tolist()
        self.logits = logits[-1]
        return logits

    def decode(self, ids: Sequence[int], left: int, pick: Callable[..., int]) -> int:
        """Return the token after the answer `ids`, not empty, to which up to `left` may still come. May be called again if it
        raises.

        `pick`: takes it from logits and, if they are known, `best_of` these. On CUDA, a graph computes it (`static`).
        """
        token = None
        last = len(ids) - 1
        try:
            if self._steps is None and len(self.answer) == last:
                self._steps = static.begin(
                    self.model, self._holder, self.cache, self.next_position + last, len(ids), left
                )
            if self._steps is not None:
                token = self._steps.following(self.model, self._holder, ids[-1], pick)
        except EvopruneError:  # of `pick`
            raise
        except Exception as problem:  # a capture, or a module of transformers inside it, raises of many kinds
            static.give_up(self.model, problem)
        if token is None:
            self._steps = None
            if missing := ids[len(self.answer) :]:
                self.read(torch.tensor(missing, dtype=torch.int64, device="cpu"))
            token = pick(self.logits)
        return token


def layers_of(model) -> ModuleType:
    """Return what runs the layers of the language model, by `forward` and `logits`: language/decoder.py, or language/hosted.py."""
    return hosted if isinstance(model, HostedVL) else decoder


def prefill(
    model,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    next_position: int,
    cache: KVCache | HostedCache | None = None,
    sizes: torch.Tensor | None = None,
    dropping: Dropping | None = None,
    deepstack: torch.Tensor | None = None,
) -> PrefillState:
    """Reads a prompt, or continues one that is in a cache; other arguments and errors as of `decoder.forward`.

    Args:
        next_position: position of the first generated token: by Qwen's rule the *unpruned* prompt's largest position plus
            one. Only decoding uses it.
        cache: of the columns before; it is extended in place. None starts a new prompt.
    """
    columns = len(inputs_embeds)
    given = {}
    if dropping is not None:
        columns = dropping.columns
        given["dropping"] = dropping
    if cache is None:
        cache = new_cache(model, columns)
    begin_pass(model)
    after = layers_of(model).logits(model, inputs_embeds, positions, cache, sizes, deepstack=deepstack, **given)[0]
    return PrefillState(model, cache, after, next_position, dropping)


def can_crop(model) -> bool:
    """Return whether a cache can lose its last columns: where layers have a recurrent state, a later prompt goes on from a copy."""
    return not isinstance(model, HostedVL) or hosted.can_crop(model)


def new_cache(model, columns: int | Sequence[int]) -> KVCache | HostedCache:
    """Return an empty cache for a prompt of `columns`, in each layer or in all, and an answer of the usual length."""
    if isinstance(model, HostedVL):
        return HostedCache(model)
    if isinstance(columns, int):
        return KVCache(model, columns + ANSWER_COLUMNS)
    return KVCache(model, [n + ANSWER_COLUMNS for n in columns])


@torch.inference_mode()
def teacher_forced_logits(state: PrefillState, ids: torch.Tensor, one_by_one: bool = False) -> torch.Tensor:
    """Return the logits of every token of an answer (`ids`, int64 `[n]`), each behind those before it: float32 `[n, vocabulary]`.

    The cache of `state` grows by the answer. `one_by_one`: a pass for each token, as decoding has it; else one for all.

    Raises ModelError: a logit is NaN or infinite.
    """
    logits = [state.logits[None]]
    if len(ids) > 1:
        step = 1 if one_by_one else len(ids)
        logits += [state.read(piece) for piece in ids[:-1].split(step)]
    logits = torch.cat(logits)
    if not logits.amax(1).isfinite().all():
        raise not_a_number_error("generate")
    return logits


class TokenLogprobs(NamedTuple):
    """Natural logarithms of probabilities by the raw logits: before temperature, penalties and what narrows a draw."""

    chosen: float  # of the token that was chosen
    top: list[tuple[int, float]]  # the most probable tokens, the first ones first, with theirs


def token_logprobs(logits: torch.Tensor, token: int, most: int) -> TokenLogprobs:
    """Return the log probability of a token, of its logits (float32 `[vocabulary]`), and those of the `most` most probable ones."""
    logprobs = logits.log_softmax(0)
    top = logprobs.topk(min(most, len(logprobs)))
    chosen, *values = torch.cat([logprobs[token][None], top.values]).tolist()
    return TokenLogprobs(chosen, list(zip(top.indices.tolist(), values, strict=True)))


class TokenConstraint(Protocol):
    """What the tokens of one answer may be: asked for a mask before each token, and told which one was taken."""

    def mask(self, size: int) -> torch.Tensor | None:
        """Return which of `size` token ids may come next, bool `[size]` on the CPU, at least one of them; None for all."""

    def advance(self, token: int) -> None:
        """Take the token that was chosen. It ends no answer."""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end can follow."""


class AnswerConstraint:
    """A `TokenConstraint` for what `stream_answer` calls the answer: what a model thinks before it is free.

    Thoughts have `begun` with the prompt, or `may_begin` with the first token.
    """

    def __init__(self, constraint: TokenConstraint, tokenizer: Tokenizer, begun: bool, may_begin: bool):
        self._constraint = constraint
        self._tokenizer = tokenizer
        self._begin, self._end = map(tokenizer.backend.token_to_id, THOUGHTS)
        self._thinks = begun
        self._may_begin = may_begin
        self._ids: list[int] = []  # of thoughts and what follows them

    def mask(self, size: int) -> torch.Tensor | None:
        if self._thinks:
            return None
        mask = self._constraint.mask(size)
        if mask is not None and not self._ids and self._begin is not None:
            mask[self._begin] = self._may_begin  # which is no text of an answer
        return mask

    def advance(self, token: int) -> None:
        first = not self._ids
        self._ids.append(token)
        if self._thinks:
            self._think(token)
        elif first and token == self._begin:
            self._thinks = True
        else:
            self._constraint.advance(token)

    def _think(self, token: int) -> None:
        """Take a token of thoughts, or of their end. The end may be followed by an answer where it is no token of its own."""
        if self._end is not None:
            self._thinks = token != self._end
            return
        latest = self._tokenizer.decode(self._ids[-len(THOUGHTS[1]) :])  # a token has at least a byte
        _, ended, answer = latest.partition(THOUGHTS[1])
        if ended:
            self._thinks = False
            for begun in self._tokenizer.encode(answer.lstrip()):
                self._constraint.advance(begun)

    @property
    def complete(self) -> bool:
        return not self._thinks and self._constraint.complete


class TokenStream(Iterator[int]):
    """Generated token ids; each is computed when it is requested. `eos_ids` end the answer and are not yielded.

    A state serves one answer, and so does a `constraint`. The same `seed` gives the same answer.

    Raises ModelError: while iterating, if a logit is NaN or infinite. And what the constraint raises.
    """

    def __init__(
        self,
        state: PrefillState,
        settings: GenerationOptions,
        eos_ids: Iterable[int],
        seed: int = 0,
        constraint: TokenConstraint | None = None,
    ):
        # At the end "stop" (the model ended its turn, or the constraint allows nothing more) or "length".
        self.finish_reason: str | None = None
        self.ids: list[int] = []  # the tokens yielded
        self.logprobs: list[TokenLogprobs] = []  # of each of them, if the settings ask for them
        self._state = state
        self._settings = settings
        self._picked: TokenLogprobs | None = None  # of the latest token
        self._eos_ids = frozenset(eos_ids)
        self._constraint = constraint
        penalised = settings.repetition_penalty not in (None, 1) and state.prompt_ids is not None
        self._seen: set[int] = set()  # tokens of the prompt and the answer
        if penalised:
            self._seen.update(state.prompt_ids.tolist())
        # On the CPU, so that a seed gives the same draws on every device.
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
        if self.ids:  # the pass after a token runs only when another token is requested
            token = self._state.decode(self.ids, left, self._pick)
        else:
            token = self._pick(self._state.logits)
        if token in self._eos_ids:
            self.finish_reason = "stop"
            raise StopIteration
        self.ids.append(token)
        self._seen.add(token)
        if self._picked is not None:
            self.logprobs.append(self._picked)
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _pick(self, logits: torch.Tensor, best: torch.Tensor | None = None) -> int:
        """Return the next token, of its logits; `best`: `best_of` them, if that is known."""
        token = self._choose(logits, best)
        if self._settings.logprobs is not None:
            self._picked = token_logprobs(logits, token, self._settings.logprobs)
        return token

    def _choose(self, logits: torch.Tensor, best: torch.Tensor | None) -> int:
        settings = self._settings
        if self._constraint is not None:
            mask = self._constraint.mask(len(logits))  # while a GPU computes the logits
            if mask is not None:
                best = None
                # What is NaN or infinite stays so, and is found.
                logits = logits.where(to_device(mask, logits.device), logits - torch.inf)
        if settings.temperature == 0 and settings.repetition_penalty in (None, 1):
            if best is None:
                best = best_of(logits)
            token, good = best.tolist()
            self._check(good)
            return token
        logits = logits.cpu()
        self._check(logits.max().isfinite())  # the largest is NaN where any is
        return choose(logits, settings, self._random, self._seen)

    def _check(self, good: bool | torch.Tensor) -> None:
        """Raises ModelError where logits are not good."""
        if not good:
            raise not_a_number_error("generate" if self.ids else "prefill")


def choose(
    logits: torch.Tensor, settings: GenerationOptions, random: torch.Generator, seen: Collection[int] = ()
) -> int:
    """Return the next token id: the most probable one, or a draw by a CPU generator.

    `logits`: float32 `[vocabulary]`. `seen`: the tokens of prompt and answer, which a repetition penalty is for.
    """
    if settings.repetition_penalty not in (None, 1):
        logits = penalised(logits, settings.repetition_penalty, seen)
    if settings.temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(probabilities(logits.cpu(), settings), 1, generator=random))


def penalised(logits: torch.Tensor, penalty: float, seen: Collection[int]) -> torch.Tensor:
    """Logits of tokens that were seen become smaller where the penalty is above 1 (arXiv 1909.05858), as in transformers."""
    ids = to_device(torch.tensor([*seen], dtype=torch.int64, device="cpu"), logits.device)
    scores = logits[ids]
    return logits.index_put((ids,), torch.where(scores < 0, scores * penalty, scores / penalty))


def probabilities(logits: torch.Tensor, settings: GenerationOptions) -> torch.Tensor:
    """Return those of a draw, float64 `[vocabulary]`, up to a factor: by temperature, `top_k`, nucleus (arXiv 1904.09751)."""
    # From the largest logit down, so that a tiny temperature cannot overflow.
    logits = logits.double()
    logits = (logits - logits.max()) / settings.temperature
    if 0 < settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], float("-inf"))
    shares = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = shares.sort(descending=True, stable=True)
        # A token is kept if those before it do not reach top_p, so the first one is always kept.
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0
        shares = torch.zeros_like(shares).scatter_(0, order, ordered)
    return shares


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """Yield the text of token ids, in pieces, as the ids arrive; joined, they equal `tokenizer.decode` of all ids.

    A byte-level token may end inside a character. A piece ends with a whole character.
    """
    stream = DecodeStream(skip_special_tokens=True)
    pending = []
    for token in ids:
        pending.append(token)
        if piece := stream.step(tokenizer.backend, token):
            yield piece
            pending = []
    if rest := tokenizer.decode(pending):  # an incomplete character, which the stream would hold back
        yield rest


def begins_with_thoughts(tokenizer: Tokenizer, prompt_ids: torch.Tensor) -> bool:
    """Return whether a prompt (int64 `[L]`) ends with the beginning of the model's thoughts."""
    return opens_thoughts(tokenizer.backend.decode(prompt_ids[-16:].tolist(), skip_special_tokens=False))


def stream_answer(tokenizer: Tokenizer, ids: Iterable[int], prompt_ids: torch.Tensor) -> Iterator[tuple[str, bool]]:
    """Yield the text of token ids, in pieces as of `stream_text`; of each, whether it belongs to the model's thoughts.

    Thoughts end at `</think>`: the token where the tokenizer has one, else the text. They begin with the prompt (int64 `[L]`), or
    with the first token; then the first piece is an empty one of theirs. What is between thoughts and answer, `</think>` and white
    space, belongs to neither.
    """
    ids = iter(ids)
    begin, end = map(tokenizer.backend.token_to_id, THOUGHTS)
    if not begins_with_thoughts(tokenizer, prompt_ids):
        first = list(islice(ids, 1))
        if begin is None or first != [begin]:
            yield from ((piece, False) for piece in stream_text(tokenizer, chain(first, ids)))
            return
    yield "", True
    if end is not None:
        thoughts = stream_text(tokenizer, takewhile(lambda token: token != end, ids))
        pieces = chain(zip(thoughts, repeat(True)), zip(stream_text(tokenizer, ids), repeat(False)))
    else:
        pieces = _split(stream_text(tokenizer, ids), THOUGHTS[1])
    begun = set()
    for piece, thought in pieces:
        if thought not in begun:
            piece = piece.lstrip()
        if piece:
            begun.add(thought)
            yield piece, thought


def _split(pieces: Iterator[str], end: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a text; of each, whether it comes before `end`, which is in none of them."""
    held = ""  # what may be a beginning of `end`
    for piece in pieces:
        before, separator, after = (held + piece).partition(end)
        if separator:
            yield before, True
            yield after, False
            yield from zip(pieces, repeat(False))
            return
        start = next(
            i for i in range(max(0, len(before) - len(end) + 1), len(before) + 1) if end.startswith(before[i:])
        )
        held = before[start:]
        yield before[:start], True
    yield held, True


class StopStrings:
    """Ends an answer where one of some texts, none of them empty, would begin.

    Of several that a text has, that which is complete first counts, and of these the longest: so it does not matter in which pieces
    the text arrives.

    Attributes:
        found: the text at which the answer ended; None where none has come.
    """

    def __init__(self, stops: Sequence[str]):
        self.found: str | None = None
        self._stops = stops

    def cut(self, pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
        """Yield pieces, as of `stream_answer`, up to one of the texts. Thoughts pass. What may be its beginning is held back."""
        held = ""
        for piece, thought in pieces:
            if thought:
                yield piece, True
                continue
            held += piece
            if self._stops_at(held):
                held = held[: held.index(self.found)]
                break
            certain = len(held) - self._begun(held)
            if certain:
                yield held[:certain], False
            held = held[certain:]
        if held:
            yield held, False

    def _stops_at(self, text: str) -> bool:
        """Return whether one of the texts is in this one, and note which."""
        ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if ends:
            *_, self.found = min(ends)
        return bool(ends)

    def _begun(self, text: str) -> int:
        """Return how many characters at its end may be the beginning of one of the texts."""
        longest = min(len(text), max(map(len, self._stops)) - 1)
        return next((n for n in range(longest, 0, -1) if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
