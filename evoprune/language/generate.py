"""From visual features to text: prompt embeddings, prefill, decoding token by token, streamed text.

Pruned columns leave gaps among the positions (`prompt.prompt_positions`).
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from evoprune.backend.devices import to_device
from evoprune.errors import ModelError
from evoprune.language import decoder, static
from evoprune.language.decoder import KVCache
from evoprune.language.dropping import Dropping
from evoprune.language.prompt import Place
from evoprune.language.settings import GenerationOptions
from evoprune.language.static import best_of
from evoprune.language.tokenizer import Tokenizer
from evoprune.methods.chain import Pipeline
from evoprune.methods.types import ascending, generator_seed
from evoprune.model.config import ANSWER_COLUMNS
from evoprune.model.numerics import not_a_number_error


@dataclass
class PrefillState:
    """The state after a prompt was read, from which decoding starts."""

    cache: KVCache  # keys and values of the prompt; decoding extends it in place
    logits: torch.Tensor  # float32 `[vocabulary]`, of the token after the prompt
    next_position: int  # M-RoPE position of the first generated token, the same in time, height and width
    dropping: Dropping | None = None  # what left while the prompt was read
    prompt_ids: torch.Tensor | None = None  # int64 `[L]`, of the unpruned prompt; a repetition penalty needs them


def embed_ids(model, ids: torch.Tensor) -> torch.Tensor:
    """The embeddings `[n, hidden]` of token ids, int64 `[n]`. Raises ModelError: the model has no embedding for one of them."""
    embed, norm = model.model.language_model.embed_tokens, model.model.language_model.norm
    if len(ids) and ids.max() >= len(embed.weight):
        problem = f"the tokenizer makes token {int(ids.max())}, and the model knows {len(embed.weight):,}"
        raise ModelError(problem, "take tokenizer and weights from the same model", stage="prefill")
    embeds = embed(to_device(ids, embed.weight.device))
    return embeds.to(norm.weight.dtype)  # embeddings may stay as their file has them


@dataclass(frozen=True)
class Visual:
    """What the language model reads of one input.

    Raises ValueError: `kept` and `features` differ in length, or `kept` is not ascending within the place.
    """

    place: Place  # in the unpruned prompt
    features: torch.Tensor  # `[K, hidden]`, the embeddings of the kept visual tokens
    kept: torch.Tensor  # int64 `[K]`, indices of these among the placeholders, ascending; on the CPU from then on
    size: torch.Tensor | None = None  # float32 `[K]`, the weight of each in attention
    deepstack: torch.Tensor | None = None  # `[n, K, hidden]`, what is added to them after each of the first n layers

    def __post_init__(self):
        kept, most = self.kept.cpu(), len(self.place) - 1
        object.__setattr__(self, "kept", kept)  # read once: from an accelerator it waits
        if len(kept) != len(self.features):
            raise ValueError(f"{len(self.features)} features for {len(kept)} visual tokens")
        if len(kept) and (kept[0] < 0 or kept[-1] > most or bool((kept.diff() <= 0).any())):
            raise ValueError(f"kept visual tokens must ascend within 0..{most}")

    @cached_property
    def columns(self) -> torch.Tensor:
        """int64 `[K]` on the CPU, the columns of the kept tokens in the unpruned prompt."""
        return self.place.columns[self.kept]


def embed_prompt(model, input_ids: torch.Tensor, visuals: Sequence[Visual]) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings `[C, hidden]` of a pruned prompt, in the model's dtype; and int64 `[C]` on the CPU, ascending, its columns.

    C is L less the tokens that are not kept and the columns that leave with them (`Place.around`). Columns are those of the
    unpruned prompt, `input_ids` (int64 `[L]`), and so are positions. `visuals`: of its inputs, in the order of their places.

    Raises ModelError: an id that the model does not know.
    """
    stays = torch.ones(len(input_ids), dtype=torch.bool, device="cpu")
    for visual in visuals:
        for run in visual.place.left_out(visual.kept):
            stays[run.start : run.stop] = False
        stays[visual.place.columns] = False
        stays[visual.columns] = True
    columns = stays.nonzero()[:, 0]
    with torch.inference_mode():
        at = torch.searchsorted(columns, torch.cat([visual.columns for visual in visuals]))
        # The model need not know the ids of placeholders.
        embeds = embed_ids(model, input_ids.cpu()[columns].index_fill_(0, at, 0))
        features = torch.cat([visual.features.to(embeds) for visual in visuals])
        return embeds.index_copy_(0, to_device(at, embeds.device), features), columns


def column_sizes(visuals: Sequence[Visual], columns: torch.Tensor) -> torch.Tensor | None:
    """float32 `[C]`: the cluster sizes of the columns of `embed_prompt`, 1 for text; None where all are 1."""
    sized = [visual for visual in visuals if visual.size is not None]
    if not sized:
        return None
    device = sized[0].size.device
    every = torch.ones(int(columns[-1]) + 1, dtype=torch.float32, device=device)
    for visual in sized:
        every[to_device(visual.columns, device)] = visual.size
    return every[to_device(columns, device)]


def column_deepstack(visuals: Sequence[Visual], columns: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
    """`[n, C, hidden]`: what is added to the columns of `embed_prompt` after the first n layers, None for nothing.

    `like`: the embeddings of these columns.
    """
    if any(visual.deepstack is None for visual in visuals):
        return None
    made = like.new_zeros(len(visuals[0].deepstack), *like.shape)
    for visual in visuals:
        at = to_device(torch.searchsorted(columns, visual.columns), like.device)
        made[:, at] = visual.deepstack.to(like)
    return made


def dropping_for(
    model,
    method: Pipeline,
    budget: float,
    visuals: Sequence[Visual],
    grids: Sequence[tuple[int, int, int]],
    embeds: torch.Tensor,
    columns: torch.Tensor,
) -> Dropping | None:
    """What leaves while a pruned prompt is read; None where the method lets nothing leave inside the language model.

    `method`, `budget`: as the user named them; `grids`: (T, H, W) in units of each input; `embeds`, `columns`: from `embed_prompt`.
    """
    kept = [visual.kept for visual in visuals]
    plan = method.language_plan(model.config.text_config.num_hidden_layers, sum(map(len, kept)), budget)
    if plan is None:
        return None
    pairs, inside, before = [], [], 0
    for mine, (count, height, width) in zip(kept, grids, strict=True):
        pairs.append(mine // (height * width) + before)
        row, column = mine // width % height, mine % width
        inside.append(torch.stack([row.float() / height, column.float() / width], 1))
        before += count
    places = torch.isin(columns, torch.cat([visual.columns for visual in visuals])).nonzero()[:, 0]
    return Dropping(model, method.language, plan, embeds, places, torch.cat(pairs), torch.cat(inside))


def prefill(
    model,
    inputs_embeds: torch.Tensor,
    positions: torch.Tensor,
    next_position: int,
    cache: KVCache | None = None,
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
    if cache is None:
        columns = len(inputs_embeds) if dropping is None else dropping.columns
        room = columns + ANSWER_COLUMNS if isinstance(columns, int) else [each + ANSWER_COLUMNS for each in columns]
        cache = KVCache(model, room)
    after = decoder.logits(model, inputs_embeds, positions, cache, sizes, dropping=dropping, deepstack=deepstack)[0]
    return PrefillState(cache, after, next_position, dropping)


def _read(model, state: PrefillState, ids: torch.Tensor, before: int = 0) -> torch.Tensor:
    """The logits after each of some tokens of an answer, which stand behind `before` others: float32 `[n, vocabulary]`."""
    positions = (ascending(len(ids), "cpu") + state.next_position + before).expand(3, -1)
    return decoder.logits(model, embed_ids(model, ids), positions, state.cache, last=len(ids))


@torch.inference_mode()
def along(model, state: PrefillState, ids: torch.Tensor, one_by_one: bool = False) -> torch.Tensor:
    """float32 `[n, vocabulary]`: the logits of every token of an answer (`ids`, int64 `[n]`), each behind those before it.

    The cache of `state` grows by the answer. `one_by_one`: a pass for each token, as decoding has it; else one for all.

    Raises ModelError: a logit is NaN or infinite.
    """
    each, pieces = state.logits[None], ids[:-1].split(1 if one_by_one else len(ids))
    if len(ids) > 1:
        each = torch.cat([each, *(_read(model, state, piece, at) for at, piece in enumerate(pieces))])
    if not each.amax(1).isfinite().all():
        raise not_a_number_error("generate")
    return each


class TokenStream(Iterator[int]):
    """Generated token ids; each is computed when it is requested. `eos_ids` end the answer and are not yielded.

    The cache of `state` grows by the tokens that are decoded plainly, so a state serves one answer; on CUDA the others go through
    a graph (`static`). The same `seed` gives the same answer.

    Raises ModelError: while iterating, if a logit is NaN or infinite.
    """

    def __init__(self, model, state: PrefillState, settings: GenerationOptions, eos_ids: Iterable[int], seed: int = 0):
        self.finish_reason: str | None = None  # at the end "stop" (the model ended its turn) or "length"
        self.ids: list[int] = []  # the tokens yielded
        self._model, self._state, self._settings = model, state, settings
        self._eos_ids = frozenset(eos_ids)
        penalised = settings.repetition_penalty not in (None, 1) and state.prompt_ids is not None
        self._seen = set(state.prompt_ids.tolist()) if penalised else set()  # tokens of the prompt and the answer
        # On the CPU, so that a seed gives the same draws on every device.
        self._random = torch.Generator().manual_seed(generator_seed(seed))
        self._read = 0  # how many of them are in the cache of the state
        self._steps: static.Steps | None = None  # where the others are
        self._holder = object()

    @torch.inference_mode()
    def __next__(self) -> int:
        if self.finish_reason is None and len(self.ids) == self._settings.max_new_tokens:
            self.finish_reason = "length"
        if self.finish_reason is not None:
            raise StopIteration
        # The pass after a token runs only when another token is requested.
        token = self._stepped() if self.ids else None
        if token is None:
            token = self._picked(self._state.logits if not self.ids else self._plainly())
        if token in self._eos_ids:
            self.finish_reason = "stop"
            raise StopIteration
        self.ids.append(token)
        self._seen.add(token)
        return token

    def _plainly(self) -> torch.Tensor:
        """The logits after all tokens so far: those that the cache lacks are read, usually one."""
        missing = torch.tensor(self.ids[self._read :], dtype=torch.int64, device="cpu")
        logits = _read(self._model, self._state, missing, self._read)[-1]
        self._read = len(self.ids)
        return logits

    def _stepped(self) -> int | None:
        """The next token by a step on tensors that keep their place; None where it is to be decoded plainly."""
        last = len(self.ids) - 1
        try:
            if self._steps is None and self._read == last:
                position, left = self._state.next_position + last, self._settings.max_new_tokens - len(self.ids)
                given = self._model, self._holder, self._state.cache, position, len(self.ids), left
                self._steps = static.begin(*given)
            made = self._steps and self._steps.following(self._model, self._holder, self.ids[-1], self._picked)
        except RuntimeError as problem:
            static.give_up(self._model, problem)
            made = None
        if made is None:
            self._steps = None
        return made

    def _picked(self, logits: torch.Tensor, best: torch.Tensor | None = None) -> int:
        """The next token, of its logits; `best`: `best_of` them, if that is known."""
        settings = self._settings
        if best_wins := settings.temperature == 0 and settings.repetition_penalty in (None, 1):
            token, good = (best_of(logits) if best is None else best).tolist()
        else:
            logits = logits.cpu()
            good = logits.max().isfinite()  # the largest is NaN where any is
        if not good:
            raise not_a_number_error("generate" if self.ids else "prefill")
        return token if best_wins else choose(logits, settings, self._random, self._seen)


def choose(
    logits: torch.Tensor, settings: GenerationOptions, random: torch.Generator, seen: Collection[int] = ()
) -> int:
    """The next token id: the most probable one, or a draw by a CPU generator.

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
    found = logits[ids]
    return logits.index_put((ids,), torch.where(found < 0, found * penalty, found / penalty))


def probabilities(logits: torch.Tensor, settings: GenerationOptions) -> torch.Tensor:
    """Of the tokens in a draw, float64 `[vocabulary]`, up to a factor: temperature, `top_k`, nucleus (arXiv 1904.09751)."""
    # From the largest logit down, so that a tiny temperature cannot overflow.
    logits = logits.double()
    logits = (logits - logits.max()) / settings.temperature
    if 0 < settings.top_k < len(logits):
        logits = logits.masked_fill(logits < logits.topk(settings.top_k).values[-1], float("-inf"))
    made = logits.softmax(-1)
    if settings.top_p < 1:
        ordered, order = made.sort(descending=True, stable=True)
        # A token is kept if those before it do not reach top_p, so the first one is always kept.
        ordered[ordered.cumsum(-1) - ordered >= settings.top_p] = 0
        made = torch.zeros_like(made).scatter_(0, order, ordered)
    return made


def stream_text(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of token ids, in pieces, as the ids arrive; joined, they equal `tokenizer.decode` of all ids.

    A byte-level token may end inside a character. Its last bytes are held back until the character is complete.
    """
    pending, yielded = [], 0
    for token in ids:
        pending.append(token)
        piece = tokenizer.decode(pending)
        # An incomplete character decodes to one replacement character, always the last; the text before it is final.
        final = piece.removesuffix("\ufffd")
        if len(final) > yielded:
            yield final[yielded:]
            yielded = len(final)
        if final == piece:
            pending, yielded = [], 0
    if rest := tokenizer.decode(pending)[yielded:]:
        yield rest
