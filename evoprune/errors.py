"""The errors a user can meet, each with its exit code, what went wrong and a hint that fixes it."""


class EvopruneError(Exception):
    """Base of every expected failure: `message` says what and where, `hint` what to do about it.

    `exit_code` is what the command line ends with, `type` the short name in JSON records.
    """

    exit_code = 1
    type = "bug"

    def __init__(self, message: str, hint: str | None = None, *, stage: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.stage = stage


class UsageError(EvopruneError):
    """Flags or arguments that make no sense, alone or together, or an output that cannot be written."""

    exit_code = 2
    type = "usage"


class VideoError(EvopruneError):
    """The video is missing, unreadable, not a video, or empty in the range asked for."""

    exit_code = 3
    type = "video"

    def __init__(self, message: str, hint: str | None = None, *, stage: str | None = "read"):
        super().__init__(message, hint, stage=stage)


class ModelError(EvopruneError):
    """The model is missing, of an unsupported kind, damaged, or cannot be reached."""

    exit_code = 4
    type = "model"

    def __init__(self, message: str, hint: str | None = None, *, stage: str | None = "load"):
        super().__init__(message, hint, stage=stage)


class OutOfMemory(EvopruneError):
    """A stage needed more memory than there is."""

    exit_code = 5
    type = "out_of_memory"


def error_record(problem: BaseException) -> dict:
    """A failure as JSON records hold it: code, type, stage, message, hint. Whatever is not expected is a bug."""
    if isinstance(problem, MemoryError):  # outside of any stage
        problem = OutOfMemory("out of memory", "close other programs, or take fewer frames (--frames)")
    elif not isinstance(problem, EvopruneError):
        hint = "this is a bug; run again with --debug and report what it prints"
        problem = EvopruneError(f"{type(problem).__name__}: {first_line(problem)}", hint)
    return {
        "code": problem.exit_code,
        "type": problem.type,
        "stage": problem.stage,
        "message": problem.message,
        "hint": problem.hint,
    }


def first_line(problem: BaseException) -> str:
    """What an exception says, in one line; its type where it says nothing."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
