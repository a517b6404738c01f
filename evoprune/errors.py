"""Errors for users. Each error has an exit code, a message, and a hint on how to fix the problem."""

import errno
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import walk_tb
from typing import TypeVar

# Hint on how to use less memory, at a shell and in Python.
USE_LESS = (
    "use fewer frames, fewer visual tokens or a lower budget: --frames, --max-visual-tokens, -b; "
    "in Python frames, max_visual_tokens, budget"
)
OTHER_MODELS = "to prune a model you loaded: evoprune.EvoPrune(budget=0.1)(model)"  # hint
# Regular expressions for out-of-memory messages of torch, oneDNN, CUDA, C++, Python threads and the dynamic linker, which use
# generic exception types.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
    "could not create a primitive$",  # "a primitive descriptor for ..." means an operation that oneDNN lacks
    "can't start new thread",
    "failed to map segment",
)

# A word of more than 200 characters, such as a data: URL with a video. The groups are the beginning and the end of the word.
LONG_WORD = re.compile(r"(?=\S{201})(\S{97})\S*(\S{100})(?!\S)")
LFS = b"version https://git-lfs.github.com/spec/"  # beginning of a pointer file, which git-lfs leaves in place of the real file
LFS_HINT = "the file itself is missing: run `git lfs pull` in its folder, or download it"

T = TypeVar("T")


class EvopruneError(Exception):
    """Base class of expected failures. `str()` returns the message, followed by the hint on its own line.

    Attributes:
        message: What failed, and for which input. It is a single line unless it quotes a name or another library's text that
            contains line breaks.
        hint: What to do about it, under the same rule, or None.
        stage: The stage that failed, such as "read" or "encode", or None.
        exit_code: Exit code of the command line.
        type: Short name of the error in JSON records.
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
    """Invalid options or arguments, alone or in combination; an output that cannot be written; or a limit of the system."""

    exit_code = 2
    type = "usage"


class DoesNotFit(UsageError):
    """The prompt and its answer together do not fit into the model's context."""


class VideoError(EvopruneError):
    """The video is missing, unreadable, not a video, or empty in the requested time span."""

    exit_code = 3
    type = "video"
    stage = "read"


class ModelError(EvopruneError):
    """The model is missing, unsupported, damaged, or cannot be reached."""

    exit_code = 4
    type = "model"
    stage = "load"


class PluginError(EvopruneError):
    """Code from another package has failed: a pruning method, or layers with quantized weights."""

    type = "plugin"


class EvopruneWarning(UserWarning):
    """Base class of warnings that the command line prints in its own format."""


class PluginWarning(EvopruneWarning):
    """A method from another package is installed but not used."""


class DeviceWarning(EvopruneWarning):
    """A GPU exists but cannot be used, or is used less efficiently than possible."""


class ModelWarning(EvopruneWarning):
    """A file or a setting in a model's folder is ignored."""


class OutOfMemory(EvopruneError):
    """A stage needed more memory than was available."""

    exit_code = 5
    type = "out_of_memory"


def call(package: str, function: Callable[..., T], *args, **kwargs) -> T:
    """Call a function that may come from another package, such as a pruning method or quantized layers, and return its result.

    Args:
        package: Name of the package for errors, or an empty string for this project's own code.
        function: The function to call. It receives all further arguments.

    Raises:
        PluginError: If the package's code fails or tries to exit the program (SystemExit), even with a successful exit code.
    """
    try:
        return function(*args, **kwargs)
    except (Exception, SystemExit) as problem:
        if not package or isinstance(problem, EvopruneError) or is_out_of_memory(problem):
            raise
        hint = (
            "report it to the authors of that package with the traceback (--debug prints it), or uninstall the package"
        )
        raise PluginError(f"{package} failed: {type(problem).__name__}: {first_line(problem)}", hint) from problem


def error_record(problem: BaseException) -> dict:
    """Return a failure as a dict for JSON records: code, type, stage, message, hint. Unexpected exceptions are reported as bugs."""
    if is_out_of_memory(problem):  # raised outside any stage
        problem = OutOfMemory("out of memory", f"close other programs, or {USE_LESS}")
    elif isinstance(problem, FileNotFoundError) and problem.filename is None:  # from os.getcwd
        problem = UsageError("the current folder no longer exists", "change to another folder")
    elif path := _damaged_module(problem):
        hint = "delete it, and Python will recreate it; was the disk full, or file size limited (ulimit -f)?"
        problem = UsageError(f"a compiled Python module is damaged: {path}", hint)
    elif not isinstance(problem, EvopruneError):
        hint = "this is a bug; report it with its traceback, which --debug prints"
        problem = EvopruneError(f"{type(problem).__name__}: {first_line(problem)}", hint)
    data = {"code": problem.exit_code} | {name: getattr(problem, name) for name in ("type", "stage", "message", "hint")}
    return data | {name: data[name] and LONG_WORD.sub(r"\1...\2", data[name]) for name in ("message", "hint")}


def _damaged_module(problem: BaseException) -> str | None:
    """Return the path of a compiled Python module that failed to load because its file is incomplete, or None.

    Python itself does not detect such files.
    """
    frames = (frame for frame, _ in walk_tb(problem.__traceback__) if frame.f_code.co_name == "_compile_bytecode")
    return next((frame.f_locals.get("bytecode_path") for frame in frames), None)


def is_out_of_memory(problem: BaseException) -> bool:
    """Return True if the type or the text of an exception indicates that the host or a device ran out of memory."""
    if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM):
        return True
    if not isinstance(problem, RuntimeError | OSError | ImportError):
        return False
    return re.search("|".join(NO_MEMORY), str(problem)) is not None


class memory_guard:  # noqa: N801 (called as a function)
    """Context manager that turns running out of memory, on the CPU or a device, into an `OutOfMemory` that names the stage.

    This is a class instead of a generator function. Since Python 3.12, the frame of a generator that raises is part of a reference
    cycle, which would keep all memory of the failed work alive until the garbage collector runs.
    """

    def __init__(self, stage: str):
        self.stage = stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, _traceback: object) -> None:
        if not (isinstance(problem, (MemoryError, RuntimeError, OSError)) and is_out_of_memory(problem)):
            return
        # GPU allocators report how much memory was requested and how much was free.
        match = re.search(
            r"Tried to allocate ([\d.]+ \wiB).*?(?:of which ([\d.]+ \wiB) is free|$)", str(problem), re.DOTALL
        )
        message = f"out of memory in {self.stage}"
        if match:
            message += f": {match[1]} requested"
        if match and match[2]:
            message += f", {match[2]} free"
        raise OutOfMemory(message, USE_LESS, stage=self.stage) from problem


@contextmanager
def named(files: Mapping[str, str]) -> Iterator[None]:
    """In messages of `VideoError`, replace the paths of temporary files (keys) with the names that users know (values)."""
    try:
        yield
    except VideoError as problem:
        for path, name in files.items():
            problem.message = problem.message.replace(path, name)
        raise


def not_a_number_error(stage: str) -> ModelError:
    """Return the error to raise if the output of `stage` contains NaN or infinity."""
    return ModelError(
        f"NaN or infinity in the output of {stage}",
        "fp16 can overflow: use dtype bf16 or fp32; if that does not help, download the weights again",
        stage=stage,
    )


def process_error(what: str, problem: OSError, stage: str | None = None) -> EvopruneError:
    """Return the error to raise if the system refuses to start or serve a process. `what` is the action that failed."""
    message = f"cannot {what}: {problem.strerror}"
    if problem.errno == errno.ENOMEM:
        return OutOfMemory(message, "close other programs", stage=stage)
    hints = {
        errno.EMFILE: "close files that this program has open, or raise their limit: ulimit -n",
        errno.ENFILE: "close other programs: this system has too many open files",
        errno.EAGAIN: "end other processes of this user, or raise their limit: ulimit -u",
    }
    python = f"sys.executable is {sys.executable}; set it to a Python that can be run"
    return UsageError(message, hints.get(problem.errno, python), stage=stage)


def first_line(problem: BaseException) -> str:
    """Return the first line of an exception's message, or its type if there is no message or it cannot be created."""
    try:
        text = str(problem).strip()
    except Exception:  # exceptions from other packages may fail to format
        text = ""
    return (text or type(problem).__name__).splitlines()[0]
