"""The errors a user can meet, each with its exit code, what went wrong and a hint that fixes it."""

import errno
import re
import sys
from collections.abc import Callable
from traceback import walk_tb
from typing import TypeVar

# What takes less memory, at a shell and in Python.
USE_LESS = (
    "take fewer frames, fewer visual tokens or a lower budget: --frames, --max-visual-tokens, -b; "
    "in Python frames, max_visual_tokens, budget"
)
# How torch, oneDNN, CUDA, C++, Python's threads and the loader of libraries say that there is no memory, where they raise
# something that may mean anything; as regular expressions.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
    "could not create a primitive$",  # "a primitive descriptor for ..." is a product that oneDNN does not have
    "can't start new thread",
    "failed to map segment",
)

# Of more than 200 characters, such as a video inside its own URL: its beginning and its end.
LONG_WORD = re.compile(r"(?=\S{201})(\S{97})\S*(\S{100})(?!\S)")
LFS = b"version https://git-lfs.github.com/spec/"  # how what git-lfs leaves in the place of a file begins
LFS_HINT = "the file itself is missing: run `git lfs pull` in its folder, or download it"

T = TypeVar("T")


class EvopruneError(Exception):
    """Report an expected failure, as the base of all: `message` says what and where, `hint` what to do. As a text it has both.

    `exit_code` is what the command line ends with, `type` the short name in JSON records.
    """

    exit_code = 1
    type = "bug"
    stage: str | None = None

    def __init__(self, message: str, hint: str | None = None, *, stage: str | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.stage = stage or self.stage

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return f"{self.message}\nhint: {self.hint}"


class UsageError(EvopruneError):
    """Report flags or arguments that make no sense, alone or together, an output that cannot be written, or a system's limit."""

    exit_code = 2
    type = "usage"


class DoesNotFit(UsageError):
    """Report a prompt that does not fit into the model's context together with its answer."""


class VideoError(EvopruneError):
    """Report a video that is missing, unreadable, not a video, or empty in the range asked for."""

    exit_code = 3
    type = "video"
    stage = "read"


class ModelError(EvopruneError):
    """Report a model that is missing, of an unsupported kind, damaged, or cannot be reached."""

    exit_code = 4
    type = "model"
    stage = "load"


class PluginError(EvopruneError):
    """Report a failure in code that another package brings: a method, or layers of quantised weights."""

    type = "plugin"


class EvopruneWarning(UserWarning):
    """Base of the warnings that the command line prints in its own way."""


class PluginWarning(EvopruneWarning):
    """Warn of a method of another package that is installed and not used."""


class DeviceWarning(EvopruneWarning):
    """Warn of a GPU that is there and cannot be used."""


class ModelWarning(EvopruneWarning):
    """Something that a model's folder holds is not used."""


class OutOfMemory(EvopruneError):
    """Report a stage that needed more memory than there is."""

    exit_code = 5
    type = "out_of_memory"


def call(package: str, function: Callable[..., T], *args, **kwargs) -> T:
    """Return what a function returns that another package may bring, of a method or of quantised layers.

    `package`: how an error names it; empty for this project's own code.

    Raises PluginError: the package's code failed, or would have ended the program (SystemExit), perhaps as if nothing were wrong.
    """
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as problem:
        if not package or isinstance(problem, EvopruneError) or is_out_of_memory(problem):
            raise
        hint = (
            "report it to that package's authors, with the traceback, which --debug prints; or do without that package"
        )
        raise PluginError(f"{package} failed: {type(problem).__name__}: {first_line(problem)}", hint) from problem


def error_record(problem: BaseException) -> dict:
    """Return a failure as JSON records hold it: code, type, stage, message, hint. Whatever is not expected is a bug."""
    if is_out_of_memory(problem):  # outside of any stage
        problem = OutOfMemory("out of memory", f"close other programs, or {USE_LESS}")
    elif isinstance(problem, FileNotFoundError) and problem.filename is None:  # from os.getcwd
        problem = UsageError("the current folder is gone", "go to another")
    elif path := _damaged_module(problem):
        hint = "delete it, and Python makes it anew; was a disk full, or the size of files limited (ulimit -f)?"
        problem = UsageError(f"a compiled module of Python is damaged: {path}", hint)
    elif not isinstance(problem, EvopruneError):
        hint = "this is a bug; report it with its traceback, which --debug prints"
        problem = EvopruneError(f"{type(problem).__name__}: {first_line(problem)}", hint)
    data = {"code": problem.exit_code} | {name: getattr(problem, name) for name in ("type", "stage", "message", "hint")}
    return data | {name: data[name] and LONG_WORD.sub(r"\1...\2", data[name]) for name in ("message", "hint")}


def _damaged_module(problem: BaseException) -> str | None:
    """Return the compiled file of a module that Python could not load: it was written in part, which Python does not notice."""
    frames = (frame for frame, _ in walk_tb(problem.__traceback__) if frame.f_code.co_name == "_compile_bytecode")
    return next((frame.f_locals.get("bytecode_path") for frame in frames), None)


def is_out_of_memory(problem: BaseException) -> bool:
    """Return whether a host or a device ran out of memory, by the exception's type, or by its text."""
    if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM):
        return True
    if not isinstance(problem, RuntimeError | OSError | ImportError):
        return False
    return re.search("|".join(NO_MEMORY), str(problem)) is not None


class memory_guard:  # noqa: N801 (called as a function)
    """Turn running out of memory in a block, on the CPU or on a device, into an `OutOfMemory` that names the stage.

    No generator: from Python 3.12 on, the frame of one that raises is part of a cycle, which keeps all memory that the failed
    work had until the garbage collector comes.
    """

    def __init__(self, stage: str):
        self.stage = stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, _traceback: object) -> None:
        if not (isinstance(problem, (MemoryError, RuntimeError, OSError)) and is_out_of_memory(problem)):
            return
        # The allocator of a GPU says how much was asked for and how much was free.
        said = re.search(
            r"Tried to allocate ([\d.]+ \wiB).*?(?:of which ([\d.]+ \wiB) is free|$)", str(problem), re.DOTALL
        )
        message = f"out of memory in {self.stage}"
        if said:
            message += f": {said[1]} wanted"
        if said and said[2]:
            message += f", {said[2]} free"
        raise OutOfMemory(message, USE_LESS, stage=self.stage) from problem


def process_error(what: str, problem: OSError, stage: str | None = None) -> EvopruneError:
    """Return the error where the system refuses to start or serve a process: `what` cannot be done."""
    message = f"cannot {what}: {problem.strerror}"
    if problem.errno == errno.ENOMEM:
        return OutOfMemory(message, "close other programs", stage=stage)
    hints = {
        errno.EMFILE: "close files that this program holds open, or allow it more of them: ulimit -n",
        errno.ENFILE: "close other programs: this system has too many open files",
        errno.EAGAIN: "end other processes of this user, or allow more of them: ulimit -u",
    }
    python = f"sys.executable is {sys.executable}; set it to a Python that can be run"
    return UsageError(message, hints.get(problem.errno, python), stage=stage)


def first_line(problem: BaseException) -> str:
    """Return what an exception says, in one line; its type where it says nothing, or cannot say it."""
    try:
        said = str(problem).strip()
    except Exception:  # of another package
        said = ""
    return (said or type(problem).__name__).splitlines()[0]
