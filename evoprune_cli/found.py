"""The output file of `evoprune find`, with one line per video that lists the moments found in it."""

from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from evoprune.batch import RecordFile, Settings
from evoprune.report import record_line
from evoprune.session import FindOptions

SCHEMA = "evoprune/found@1"


@dataclass(frozen=True)
class SearchSettings(Settings):
    """The options of a search. Their `start_s` and `end_s` are recorded in each row."""

    ALWAYS: ClassVar[tuple[str, ...]] = (*Settings.ALWAYS, *(option.name for option in fields(FindOptions)))

    @property
    def groups(self) -> tuple[Any, ...]:
        """The option groups that affect which moments are found."""
        return self.model, self.pruning, self.sampling, self.find


class MomentsFile(RecordFile):
    """A file of `FoundVideo` records; see `RecordFile`."""

    schema: ClassVar[str] = SCHEMA
    noun: ClassVar[str] = "search"


@dataclass(frozen=True)
class FoundVideo:
    """The search results for one video, stored as one line in the output file.

    `moments` has the same format as `find --json`, with each query's best moments first. If the search failed, `moments` is None
    and `error` describes the failure.
    """

    id: str
    moments: list[dict[str, Any]] | None
    error: dict[str, Any] | None
    model: dict[str, Any]  # includes `revision`, a hub model's commit
    batch: dict[str, Any]  # everything the moments depend on: `row`, `settings`, and `files`

    def to_json(self, ascii_only: bool = False) -> str:
        """Return the record as one line of compact JSON. See `Report.to_json`."""
        return record_line({"schema": SCHEMA} | asdict(self), ascii_only)
