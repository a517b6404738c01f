"""Remove pruned visual tokens from a prompt. Used by sessions, users' own models, streams, and the vLLM plugin.

The remaining tokens keep their column indices and M-RoPE positions from the unpruned prompt (see `prompt.prompt_positions`), so
pruned tokens leave gaps in both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evoprune.backend import to_device
from evoprune.language.prompt import Place
from evoprune.vision import Encoded


@dataclass(frozen=True, eq=False)
class PrunedPrompt:
    """The C prompt columns that remain after `prune_prompt`. Slicing returns a `PrunedPrompt` with a subset of these columns."""

    ids: torch.Tensor  # int64 `[C]` on the CPU, token IDs
    columns: torch.Tensor  # int64 `[C]` on the CPU, ascending column indices in the unpruned prompt
    visual: torch.Tensor  # bool `[C]` on the CPU, True for visual tokens
    sizes: torch.Tensor | None = None  # float32 `[C]`, cluster sizes, or None if all are 1
    positions: torch.Tensor | None = None  # int64 `[3, C]` on the CPU, M-RoPE positions in the unpruned prompt
    last: torch.Tensor | None = None  # int64 `[3, 1]`, largest M-RoPE positions in the unpruned prompt
    embeds: torch.Tensor | None = None  # `[C, hidden]`, input embeddings, or None if the text wasn't embedded
    deepstack: torch.Tensor | None = None  # `[n, C, hidden]`, features to add after layers 0 to n - 1, if any

    def __len__(self) -> int:
        return len(self.columns)

    def __getitem__(self, part: slice) -> "PrunedPrompt":
        def cut(x: torch.Tensor | None, *where: slice) -> torch.Tensor | None:
            return None if x is None else x[where]

        every = slice(None)
        return PrunedPrompt(
            self.ids[part],
            self.columns[part],
            self.visual[part],
            cut(self.sizes, part),
            cut(self.positions, every, part),
            self.last,
            cut(self.embeds, part),
            cut(self.deepstack, every, part),
        )

    @property
    def following(self) -> int:
        """M-RoPE position of the first token after the prompt: the largest position in the unpruned prompt plus one."""
        return int(self.last.max()) + 1


def prune_prompt(
    ids: torch.Tensor,
    places: Sequence[Place],
    read: Sequence[Encoded],
    positions: torch.Tensor | None = None,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> PrunedPrompt:
    """Remove the pruned visual tokens from a prompt, as well as the timestamps and markers of fully pruned frame pairs.

    Args:
        ids: Token IDs of the unpruned prompt, int64 `[L]` on the CPU.
        places: The input locations in the prompt, in order. Inputs not listed here aren't pruned.
        read: The encoded inputs, one for each entry of `places`.
        positions: M-RoPE positions of the unpruned prompt, int64 `[3, L]` on the CPU. None means that the caller computes positions
            for an entire batch.
        embed: Maps text token IDs, int64 `[n]`, to their embeddings, `[n, hidden]`. It is never called with placeholders, so their
            token IDs don't have to be in the model's vocabulary. None means that the model embeds the prompt itself.

    Raises:
        ValueError: If the kept tokens of an input are not in ascending order, are outside its location in the prompt, or don't
            match its number of features. Exceptions raised by `embed` propagate unchanged.
    """
    stays = torch.ones(len(ids), dtype=torch.bool, device="cpu")
    visual = torch.zeros_like(stays)
    for place, tokens in zip(places, read, strict=True):
        kept = tokens.kept_here
        _check(place, tokens)
        for run in place.left_out(kept):
            stays[run.start : run.stop] = False
        stays[place.columns] = False
        visual[place.columns[kept]] = True
    columns = (stays | visual).nonzero()[:, 0]
    visual = visual[columns]
    text = ~visual
    # Each column's index in a table with the text columns, followed by the visual tokens.
    row = torch.where(text, text.cumsum(0), text.sum() + visual.cumsum(0)) - 1
    sizes = _sizes(int(text.sum()), read, row)
    ids = ids[columns]
    embeds = deepstack = None
    if embed is not None:
        with torch.inference_mode():
            words = embed(ids[text])
            row = to_device(row, words.device)
            embeds = torch.cat([words, *(tokens.features.to(words) for tokens in read)])[row]
            if all(tokens.deepstack is not None for tokens in read):
                nothing = words.new_zeros(len(read[0].deepstack), *words.shape)
                deepstack = torch.cat([nothing, *(tokens.deepstack.to(words) for tokens in read)], 1)[:, row]
    last = None
    if positions is not None:
        last = positions.amax(1, keepdim=True)
        positions = positions[:, columns]
    return PrunedPrompt(ids, columns, visual, sizes, positions, last, embeds, deepstack)


def _check(place: Place, tokens: Encoded) -> None:
    kept = tokens.kept_here
    last = len(place) - 1
    if len(kept) != len(tokens.features):
        raise ValueError(f"{len(tokens.features)} features for {len(kept)} visual tokens")
    if len(kept) and (kept[0] < 0 or kept[-1] > last or bool((kept.diff() <= 0).any())):
        raise ValueError(f"kept visual tokens must ascend within 0..{last}")


def _sizes(text: int, read: Sequence[Encoded], row: torch.Tensor) -> torch.Tensor | None:
    """Return the cluster sizes of the columns, or None if all are 1.

    Args:
        text: Number of text columns, which have size 1.
        read: The encoded inputs, which include the cluster sizes of the visual tokens.
        row: Each column's index in a table with the text columns, followed by the visual tokens.
    """
    if all(tokens.size is None for tokens in read):
        return None
    of_text = read[0].features.new_ones(text, dtype=torch.float32)
    return torch.cat([of_text, *(tokens.every_size for tokens in read)])[to_device(row, of_text.device)]
