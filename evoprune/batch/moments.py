"""The output file of a search: one line a video, with the moments that were found in it. Imports no torch."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from evoprune.batch.output import RECORDED, RecordFile, Settings
from evoprune.batch.rows import Row, product_rows
from evoprune.report import INVISIBLE, rounded
from evoprune.session import FindOptions, SamplingOptions

SCHEMA = "evoprune/found@1"


@dataclass(frozen=True)
class SearchSettings(Settings):
    """Hold the options of a search. Each row has its own part of the video instead of `start_s` and `end_s`."""

    ALWAYS: ClassVar[tuple[str, ...]] = (*RECORDED, *(option.name for option in fields(FindOptions)))

    @property
    def groups(self) -> tuple[Any, ...]:
        """Return the options that moments depend on."""
        return self.model, self.pruning, self.sampling, self.find


class MomentsFile(RecordFile):
    """A file of `FoundVideo`; otherwise as `RecordFile`."""

    schema: ClassVar[str] = SCHEMA
    noun: ClassVar[str] = "search"


@dataclass(frozen=True)
class FoundVideo:
    """A line of the file.

    `moments`: as `find --json` prints them, for each query the best first; None where the video failed, with an `error`.
    """

    id: str
    moments: list[dict[str, Any]] | None
    error: dict[str, Any] | None
    model: dict[str, Any]  # `revision`: the commit of a hub model
    batch: dict[str, Any]  # `row`, `settings` and `files`: what the moments depend on

    def to_json(self, ascii_only: bool = False) -> str:
        """Write the record as one compact line; as `Report.to_json`."""
        record = {"schema": SCHEMA} | asdict(self)
        text = json.dumps(rounded(record), ensure_ascii=ascii_only, separators=(",", ":"), allow_nan=False)
        return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def search_rows(videos: Sequence[str], queries: Sequence[str], sampling: SamplingOptions) -> list[Row]:
    """Return a row for each video, or every video of a folder; its question has one query a line.

    Raises UsageError that names all that is wrong.
    """
    return product_rows(videos, ["\n".join(queries)], sampling.start_s, sampling.end_s)
