"""A prompt without the columns of pruned visual tokens, as sessions, held models, streams and the plug-in for vLLM read it.

Columns and positions are those of the whole prompt (`prompt.prompt_positions`), so pruned columns leave gaps among both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from evoprune.backend import to_device
from evoprune.language.prompt import Place
from evoprune.vision import Encoded


@dataclass(frozen=True, eq=False)
class PrunedPrompt:
    """C columns of a prompt, made by `prune_prompt`. `prompt[:n]` and `prompt[n:]` are its columns before and from n on."""

    ids: torch.Tensor  # int64 `[C]`, on the CPU
    columns: torch.Tensor  # int64 `[C]` on the CPU, ascending, their columns in the whole prompt
    visual: torch.Tensor  # bool `[C]` on the CPU, which of them are visual tokens
    sizes: torch.Tensor | None = None  # float32 `[C]`: attention adds log(size) to the logits of each; None for 1 each
    positions: torch.Tensor | None = None  # int64 `[3, C]` on the CPU, those in the whole prompt
    last: torch.Tensor | None = None  # int64 `[3, 1]`, the largest of the whole prompt
    embeds: torch.Tensor | None = None  # `[C, hidden]`, where text was embedded
    deepstack: torch.Tensor | None = None  # `[n, C, hidden]`, added after each of the first n layers; None for 0

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
        """The position of the first token after the prompt, by Qwen's rule."""
        return int(self.last.max()) + 1


def prune_prompt(
    ids: torch.Tensor,
    places: Sequence[Place],
    read: Sequence[Encoded],
    positions: torch.Tensor | None = None,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> PrunedPrompt:
    """Return a prompt without the visual tokens that are not kept, and without the columns that leave with them.

    Args:
        ids: int64 `[L]` on the CPU, of the whole prompt.
        places: where its inputs stand, in their order. An input that is not among them stays whole.
        read: the tokens of each of these inputs.
        positions: int64 `[3, L]` on the CPU, of the whole prompt; None where the caller has them for a batch.
        embed: returns the embeddings of text, `[n, hidden]`, from its ids, int64 `[n]`. The model need not know the ids of
            placeholders. None where the model embeds a prompt itself.

    Raises ValueError: kept tokens do not ascend within their place, or are not as many as their features. And what `embed` raises.
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
    # Of each column its row among those of the text, with those of the visual tokens behind them.
    row = torch.where(text, text.cumsum(0), text.sum() + visual.cumsum(0)) - 1
    given = {"sizes": _sizes(int(text.sum()), read, row)}
    if positions is not None:
        given |= {"positions": positions[:, columns], "last": positions.amax(1, keepdim=True)}
    ids = ids[columns]
    if embed is not None:
        with torch.inference_mode():
            words = embed(ids[text])
            row = to_device(row, words.device)
            given["embeds"] = torch.cat([words, *(tokens.features.to(words) for tokens in read)])[row]
            if all(tokens.deepstack is not None for tokens in read):
                nothing = words.new_zeros(len(read[0].deepstack), *words.shape)
                given["deepstack"] = torch.cat([nothing, *(tokens.deepstack.to(words) for tokens in read)], 1)[:, row]
    return PrunedPrompt(ids, columns, visual, **given)


def _check(place: Place, tokens: Encoded) -> None:
    kept = tokens.kept_here
    last = len(place) - 1
    if len(kept) != len(tokens.features):
        raise ValueError(f"{len(tokens.features)} features for {len(kept)} visual tokens")
    if len(kept) and (kept[0] < 0 or kept[-1] > last or bool((kept.diff() <= 0).any())):
        raise ValueError(f"kept visual tokens must ascend within 0..{last}")


def _sizes(text: int, read: Sequence[Encoded], row: torch.Tensor) -> torch.Tensor | None:
    """Return the sizes of columns, 1 for those of text, of which there are `text`; None for 1 each."""
    if all(tokens.size is None for tokens in read):
        return None
    of_text = read[0].features.new_ones(text, dtype=torch.float32)
    return torch.cat([of_text, *(tokens.every_size for tokens in read)])[to_device(row, of_text.device)]
