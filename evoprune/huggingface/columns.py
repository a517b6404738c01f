"""The columns of a batch of prompts when every row loses some of its own.

What is left of a row stands together at the right, so that all rows still end where the answer begins; where a row has less left
than another one there is padding before it. A batch that was padded on the left gives up that padding as far as all rows allow.
"""

from dataclasses import dataclass

import torch

from evoprune.errors import UsageError


@dataclass(frozen=True)
class Columns:
    """What is left of which columns.

    Attributes:
        index: int64 `[B, C]`, which column of the whole batch stands at each place, ascending; -1 for padding, before all others.
        width: columns of the whole batch.
    """

    index: torch.Tensor
    width: int

    @classmethod
    def without(cls, dropped: torch.Tensor, mask: torch.Tensor | None = None) -> "Columns":
        """All columns but those that are `dropped` (bool `[B, L]`), in as few places as the row with most of them needs.

        Args:
            mask: `[B, L]`, 0 where there is padding. That before a row's first token is given up where places are short.
        """
        stays, width = ~dropped, dropped.shape[1]
        needed = stays if mask is None else stays & (mask.cumsum(1) > 0)
        places = max(1, int(needed.sum(1).max()))
        from_the_end = stays.flip(1).cumsum(1).flip(1)
        # Whatever has no place goes to one more at the front, which is cut off.
        place = torch.where(stays, (places + 1 - from_the_end).clamp(min=0), 0)
        index = torch.full((len(dropped), places + 1), -1, device=dropped.device)
        index.scatter_(1, place, torch.arange(width, device=dropped.device).expand_as(place))
        return cls(index[:, 1:], width)

    @property
    def places(self) -> int:
        """C, how many columns are left."""
        return self.index.shape[1]

    @property
    def padded(self) -> bool:
        """Whether some row has less left than another one."""
        return bool((self.index < 0).any())

    def take(self, x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """What is left of `x` (`[..., B, width]`, where B may be 1): `[..., B, C]`, `fill` at padding."""
        index = self.index.to(x.device)
        x = x.expand(*x.shape[:-2], len(index), -1)
        return x.gather(-1, index.clamp(min=0).expand(*x.shape[:-1], -1)).masked_fill(index < 0, fill)

    def following(self, width: int) -> "Columns":
        """The same of a batch that goes on up to `width` columns, of which nothing more is dropped."""
        more = torch.arange(self.width, width, device=self.index.device)
        return Columns(torch.cat([self.index, more.expand(len(self.index), -1)], 1), width)

    def first(self, places: int) -> "Columns":
        """The same of a batch that ends before what stands at a place, with what was dropped just before it.

        Raises:
            UsageError: that is another column in another row.
        """
        ends = self.index[:, places].unique()
        if len(ends) > 1:
            raise UsageError(
                "past_key_values were cut in the middle of a padded batch", "cut those of each prompt on its own"
            )
        return Columns(self.index[:, :places], int(ends))

    def repeated(self, times: int) -> "Columns":
        """Each row so many times, as beams and several answers to a prompt want it."""
        return Columns(self.index.repeat_interleave(times, 0), self.width)


def with_whole_prompt(prompt: torch.Tensor, places: int, ids: torch.Tensor) -> torch.Tensor:
    """Ids as they would be had nothing been dropped.

    Args:
        prompt: `[B, L]`.
        places: columns of the prompt that `ids` begin with.
        ids: `[B * n, places + new]`, n neighbouring rows for each prompt.

    Returns:
        `[B * n, L + new]`.
    """
    prompt = prompt.to(ids.device).repeat_interleave(len(ids) // len(prompt), 0)
    return torch.cat([prompt, ids[:, places:]], 1)
