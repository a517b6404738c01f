"""User-facing exceptions. Each has an exit code, a message, and a hint for fixing the problem."""

import errno
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from traceback import walk_tb
from typing import Any, Self, TypeVar

# Hint on reducing memory usage, both on the command line and in Python.
USE_LESS = (
    "use fewer frames, fewer visual tokens or a lower budget: --frames, --max-visual-tokens, -b; "
    "in Python frames, max_visual_tokens, budget"
)
OTHER_MODELS = "to prune a model you loaded: evoprune.EvoPrune(budget=0.1)(model)"  # hint for callers who pass a Hugging Face model
# Regular expressions that match out-of-memory messages. They are needed because torch, oneDNN, CUDA, C++, Python threads, and the
# dynamic linker report such failures as generic exceptions.
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Cannot allocate memory",
    "std::bad_alloc",
    "ALLOC_FAILED",
    "could not create a primitive$",  # "a primitive descriptor for ..." means that oneDNN doesn't support the operation
    "can't start new thread",
    "failed to map segment",
)

# Matches a word longer than 200 characters, such as a data: URL containing a video. The groups capture both ends of the word.
LONG_WORD = re.compile(r"(?=\S{201})(\S{97})\S*(\S{100})(?!\S)")
LFS = b"version https://git-lfs.github.com/spec/"  # first bytes of a git-lfs pointer file
LFS_HINT = "the file itself is missing: run `git lfs pull` in its folder, or download it"

T = TypeVar("T")
Callback = TypeVar("Callback", bound=Callable[..., Any] | None)


def hide_passwords(text: str) -> str:
    """Remove the user names and passwords from all URLs in a text, for example from a URL of a camera."""
    # The second case is a URL that was normalized like a path.
    return re.sub(r"(?<=://)[^/\s]*@|(?<=[a-z]:/)[^/\s:]+:[^/\s]*@", "", text)


class EvopruneError(Exception):
    """Base class for all expected failures. `str()` returns the message, followed by the hint on a separate line.

    Attributes:
        message: What failed, and for which input. The message is a single line unless it quotes a name or another library's message
            that contains line breaks.
        hint: How the user can fix the problem, or None. Like the message, it is usually a single line.
        stage: The failed pipeline stage, such as "read" or "encode", or None.
        exit_code: The exit code of the command line.
        type: The short name of the error type in JSON records.
    """

    exit_code = 1
    type = "bug"
    stage: str | None = None

    def __init__(self, message: str, hint: str | None = None, *, stage: str | None = None):
        message = hide_passwords(message)
        super().__init__(message)
        self.message = message
        self.hint = hint and hide_passwords(hint)
        self.stage = stage or self.stage

    def __str__(self) -> str:
        if not self.hint:
            return self.message
        return f"{self.message}\nhint: {self.hint}"


class UsageError(EvopruneError):
    """Raised if options are invalid or incompatible, an output can't be written, or a system limit is reached."""

    exit_code = 2
    type = "usage"


class DoesNotFit(UsageError):
    """Raised if the prompt and answer together exceed the model's context length."""


class VideoError(EvopruneError):
    """Raised if a video is missing or unreadable, a file isn't a video, or the requested time span contains no frames."""

    exit_code = 3
    type = "video"
    stage = "read"


class ModelError(EvopruneError):
    """Raised if a model is missing, unsupported, damaged, or can't be downloaded."""

    exit_code = 4
    type = "model"
    stage = "load"


class PluginError(EvopruneError):
    """Raised if third-party code fails, such as a pruning method or the layers of a quantized model."""

    type = "plugin"


class EvopruneWarning(UserWarning):
    """Base class for warnings that the command line prints in its own format."""


class PluginWarning(EvopruneWarning):
    """Warns that a third-party pruning method is installed but not used."""


class DeviceWarning(EvopruneWarning):
    """Warns that a GPU can't be used or is used less efficiently than possible."""


class ModelWarning(EvopruneWarning):
    """Warns that a file or setting in a model folder is ignored."""


class OutOfMemory(EvopruneError):
    """Raised if a pipeline stage needs more memory than is available on the host or the device."""

    exit_code = 5
    type = "out_of_memory"


def call(package: str, function: Callable[..., T], *args, **kwargs) -> T:
    """Call a function that may come from another package, such as a pruning method or a quantized layer. Returns its result.

    Args:
        package: The package to blame in the error message. Pass an empty string for this project's own code.
        function: The function to call with the remaining arguments.

    Raises:
        PluginError: If the package's code raises an exception, including SystemExit with a successful exit code.
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
    """Convert an exception to a dict for JSON records, with the keys code, type, stage, message, and hint.

    Unexpected exceptions are reported as bugs.
    """
    if is_out_of_memory(problem):  # raised outside any stage
        problem = OutOfMemory("out of memory", f"close other programs, or {USE_LESS}")
    elif isinstance(problem, FileNotFoundError) and problem.filename is None:  # raised by os.getcwd
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
    """Return the path of the truncated .pyc file that caused an exception, or None. Python itself doesn't detect such files."""
    frames = (frame for frame, _ in walk_tb(problem.__traceback__) if frame.f_code.co_name == "_compile_bytecode")
    return next((frame.f_locals.get("bytecode_path") for frame in frames), None)


def is_out_of_memory(problem: BaseException) -> bool:
    """Return True if an exception's type or message indicates that the host or a device ran out of memory."""
    if isinstance(problem, MemoryError) or (isinstance(problem, OSError) and problem.errno == errno.ENOMEM):
        return True
    if not isinstance(problem, RuntimeError | OSError | ImportError):
        return False
    return re.search("|".join(NO_MEMORY), str(problem)) is not None


class memory_guard:  # noqa: N801 (called as a function)
    """Context manager that converts CPU and device out-of-memory errors to an `OutOfMemory` error that specifies the stage.

    This is a class rather than a generator function because, since Python 3.12, the frame of a generator that raises an exception
    is part of a reference cycle. The cycle would keep all memory from the failed operation alive until the garbage collector runs.
    """

    def __init__(self, stage: str):
        self.stage = stage

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, _traceback: object) -> None:
        if not (isinstance(problem, (MemoryError, RuntimeError, OSError)) and is_out_of_memory(problem)):
            return
        # GPU allocator messages include the amount of memory requested and the amount that was free.
        match = re.search(
            r"Tried to allocate ([\d.]+ \wiB).*?(?:of which ([\d.]+ \wiB) is free|$)", str(problem), re.DOTALL
        )
        message = f"out of memory in {self.stage}"
        if match:
            message += f": {match[1]} requested"
        if match and match[2]:
            message += f", {match[2]} free"
        raise OutOfMemory(message, USE_LESS, stage=self.stage) from problem


class callback_errors:  # noqa: N801 (used like a function)
    """Context manager that lets the exceptions of a caller's callbacks leave the block unchanged.

    Code inside the block may handle exceptions of its own, for example by retrying with less memory or by recording that a row of a
    batch has failed. It must not do so if a callback raises an exception, because that exception is the caller's business:

        with callback_errors() as passing:
            encode(passing(progress))

    This is a class for the same reason as `memory_guard`.
    """

    def __enter__(self) -> Self:
        return self

    def __call__(self, callback: Callback) -> Callback:
        """Return a wrapper of a callback for use inside the block. None stays None."""
        if callback is None:
            return callback

        @wraps(callback)
        def wrapper(*args, **kwargs):
            try:
                return callback(*args, **kwargs)
            except Exception as problem:
                raise _CallbackError(self, problem) from None

        return wrapper

    def __exit__(self, kind: type[BaseException] | None, problem: BaseException | None, traceback: object) -> None:
        if not isinstance(problem, _CallbackError) or problem.block is not self:
            return
        own = problem.own
        context = own.__context__
        try:
            raise own
        finally:
            own.__context__ = context
            del own, problem, traceback  # breaks a reference cycle, which would keep tensors in memory


class _CallbackError(BaseException):
    """Carries an exception of a callback to the end of a `callback_errors` block, past all code that handles `Exception`."""

    def __init__(self, block: callback_errors, own: Exception):
        self.block = block
        self.own = own


@contextmanager
def named(files: Mapping[str, str]) -> Iterator[None]:
    """Replace temporary file paths in `VideoError` messages with the original names.

    Args:
        files: Maps each temporary file path to its replacement.
    """
    try:
        yield
    except VideoError as problem:
        for path, name in files.items():
            problem.message = problem.message.replace(path, name)
        raise


def not_a_number_error(stage: str) -> ModelError:
    """Return the exception to raise if a pipeline stage's output contains NaN or infinity."""
    return ModelError(
        f"NaN or infinity in the output of {stage}",
        "fp16 can overflow: use dtype bf16 or fp32; if that does not help, download the weights again",
        stage=stage,
    )


def process_error(what: str, problem: OSError, stage: str | None = None) -> EvopruneError:
    """Return the exception to raise if the operating system can't start a process or provide the required resources.

    Args:
        what: The failed action, phrased to follow "cannot".
        problem: The exception raised by the system call.
        stage: The stage that required the process, or None.
    """
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
    """Return the first line of an exception's message, or its type name if the message is empty or can't be formatted."""
    try:
        text = str(problem).strip()
    except Exception:  # an exception from another package may fail in its own `__str__`
        text = ""
    return (text or type(problem).__name__).splitlines()[0]
