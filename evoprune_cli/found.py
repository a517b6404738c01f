"""The output file of `evoprune find`: one line per video with the moments found in it."""

import json
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from evoprune.batch import RecordFile, Settings
from evoprune.report import INVISIBLE, rounded
from evoprune.session import FindOptions

SCHEMA = "evoprune/found@1"


@dataclass(frozen=True)
class SearchSettings(Settings):
    """The options of a search. Each row has its own time span instead of `start_s` and `end_s`."""

    ALWAYS: ClassVar[tuple[str, ...]] = (*Settings.ALWAYS, *(option.name for option in fields(FindOptions)))

    @property
    def groups(self) -> tuple[Any, ...]:
        """The option groups that moments depend on."""
        return self.model, self.pruning, self.sampling, self.find


class MomentsFile(RecordFile):
    """A file of `FoundVideo` records; see `RecordFile`."""

    schema: ClassVar[str] = SCHEMA
    noun: ClassVar[str] = "search"


@dataclass(frozen=True)
class FoundVideo:
    """One line of the output file.

    `moments` are as in `find --json`: best first for each query. None if the video failed, in which case `error` is set.
    """

    id: str
    moments: list[dict[str, Any]] | None
    error: dict[str, Any] | None
    model: dict[str, Any]  # includes `revision`, the commit of a hub model
    batch: dict[str, Any]  # `row`, `settings` and `files`, which the moments depend on

    def to_json(self, ascii_only: bool = False) -> str:
        """Return the record as one compact line, see `Report.to_json`."""
        record = {"schema": SCHEMA} | asdict(self)
        text = json.dumps(rounded(record), ensure_ascii=ascii_only, separators=(",", ":"), allow_nan=False)
        return INVISIBLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
