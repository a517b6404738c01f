"""The `evoprune` command, which dispatches to subcommands and handles errors, signals, closed pipes, and shell completion."""

import contextlib
import errno
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import Any

import typer
from typer.core import TyperGroup

import evoprune
from evoprune.errors import EvopruneWarning, PluginWarning, UsageError, first_line
from evoprune.report import SCHEMA
from evoprune_cli import terminal
from evoprune_cli.options import Command
from evoprune_cli.typed import Typed, remember, typed
from evoprune_cli.variables import check_variables, warn_of_unknown

# Base class of parser errors. Some Typer versions bundle click and others import it, so look it up among Typer's base classes.
ParserError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

WHOLE = 1000  # maximum length of a description of a command, in characters

# Error numbers of failed writes to redirected output. Errors with a filename refer to an input file instead.
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Group(TyperGroup):
    """The subcommand group. Looking up a subcommand imports neither pydantic nor other commands."""

    def __init__(self, **given: Any):
        super().__init__(**given)
        self.commands = BuiltIn()

    def list_commands(self, ctx):
        """Return the command names, with third-party commands at the end."""
        return [*super().list_commands(ctx), *(name for name in plugged() if self.get_command(ctx, name) is not None)]

    def get_command(self, ctx, cmd_name):
        """Return the command with this name, or None if it doesn't exist.

        If a third-party command can't be loaded, issue a warning and return None.
        """
        command = super().get_command(ctx, cmd_name)
        if command is None and (entry := plugged().get(cmd_name)):
            command = plugged_command(entry)
        return command

    def parse_args(self, ctx, args):
        """Treat `help COMMAND` as `COMMAND --help`."""
        if args[:1] == ["help"]:
            args = [*args[1:], "--help"]
        remember(Typed(None, args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Run the command, and report Ctrl-C, of which some Typer versions only return the exit code."""
        try:
            check_variables()
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            terminal.tell_stopped(stop)
            raise

    def format_commands(self, ctx, formatter):
        """Write the commands with their whole descriptions, which click would cut off in a narrow terminal."""
        commands = {name: self.get_command(ctx, name) for name in self.list_commands(ctx)}
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.get_short_help_str(WHOLE)) for name, command in commands.items()])

    def get_params(self, ctx):
        """Return the options, which are all flags. Their defaults are set to False because Typer would use pydantic for None."""
        params = super().get_params(ctx)
        for param in params:
            param.default = False
        return params


app = typer.Typer(
    name="evoprune",
    cls=Group,
    help="Ask Qwen3.8, Qwen3.6, Qwen3.5, Qwen3-VL or Qwen2.5-VL about videos. Visual tokens are pruned inside the vision "
    "encoder.\n\n"
    '\b\nevoprune ask clip.mp4 "What happens?"\nevoprune ask --help',
    epilog="Exit codes: 0 success, 1 a bug, 2 wrong usage or an output that cannot be written, 3 video error, 4 model error, "
    "5 out of memory, 6 some items failed or no setting passed, 7 verify found a difference, 130 interrupted, 143 terminated.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

# The module and the function of each command, in the order of `--help`. A module is only imported when its command is needed.
BUILT_IN = {
    "ask": "evoprune_cli.ask:ask",
    "batch": "evoprune_cli.batch:batch",
    "find": "evoprune_cli.find:find",
    "watch": "evoprune_cli.watch:watch",
    "eval": "evoprune_cli.eval:evaluate",
    "tune": "evoprune_cli.tune:tune",
    "inspect": "evoprune_cli.inspect:inspect",
    "profile": "evoprune_cli.profile:profile",
    "verify": "evoprune_cli.verify:verify",
    "methods": "evoprune_cli.methods:methods",
    "models": "evoprune_cli.models:models",
}
# Entry point group for third-party commands. Each entry point is a function decorated with `options.command`.
COMMANDS = "evoprune.commands"


class BuiltIn(Mapping[str, Any]):
    """The built-in commands as Typer commands, each created when it is first looked up."""

    def __getitem__(self, name: str) -> Any:
        return built_in(name)

    def __iter__(self) -> Iterator[str]:
        return iter(BUILT_IN)

    def __len__(self) -> int:
        return len(BUILT_IN)


@cache
def built_in(name: str) -> Any:
    return _command(EntryPoint(name, BUILT_IN[name], COMMANDS))


def _command(entry: EntryPoint) -> Any:
    """Import a command and return it as a Typer command."""
    alone = typer.Typer(add_completion=False, rich_markup_mode=None)
    alone.command(entry.name, cls=Command)(entry.load())
    return typer.main.get_command(alone)


@cache
def plugged() -> dict[str, EntryPoint]:
    """Return third-party commands by name, except commands that share a name with a built-in command."""
    return {entry.name: entry for entry in entry_points(group=COMMANDS) if entry.name not in BUILT_IN}


@cache
def plugged_command(entry: EntryPoint) -> Any:
    """Load a third-party command and return it as a Typer command. If loading fails, issue a warning and return None."""
    package = entry.dist.name if entry.dist else entry.value
    try:
        return _command(entry)
    except (Exception, SystemExit) as problem:  # importing a third-party package may raise any exception
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        warnings.warn(f"the command {entry.name} of {package} cannot be loaded ({reason})", PluginWarning, stacklevel=2)
        return None


# Shell completion uses Typer's scripts and protocol. When the user presses TAB, the shell script runs `evoprune` with the current
# line in environment variables, and offers the printed lines as completions. If nothing is printed, the shell offers files.

VARIABLE = "_EVOPRUNE_COMPLETE"


def _completes() -> bool:
    """Return True if the program was started by a shell completion script."""
    return bool(os.environ.get(VARIABLE))


# The commands.


def _version(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        typer.echo(f"evoprune {evoprune.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", is_eager=True, callback=_version, help="Print the version."),
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help(), err=True)
        raise typer.Exit(2)


# JSON schemas of error records, for commands that don't print reports.
SCHEMAS = {name: f"evoprune/{name}@1" for name in ("eval", "find", "inspect", "methods", "models", "tune", "verify")}


def _raise_for_signal(number: int, frame: FrameType | None) -> None:
    """Handle a signal that ends the command: raise KeyboardInterrupt or `Terminated`, but not while this thread imports torch.

    Torch's C++ code drops such an exception, or aborts the process.
    """
    spec = getattr(sys.modules.get("torch"), "__spec__", None)
    if getattr(spec, "_initializing", False) and _imports(frame):
        _send_later(number)
    elif number == signal.SIGINT:
        raise KeyboardInterrupt
    else:
        raise terminal.Terminated


def _imports(frame: FrameType | None) -> bool:
    """Return True if a thread whose innermost frame is `frame` is importing a module."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def run() -> None:
    """Run the command line and exit with a documented exit code. Tracebacks are only shown with `--debug` or EVOPRUNE_DEBUG=1."""
    for number in (signal.SIGINT, *terminal.ENDINGS):
        if signal.getsignal(number) is not signal.SIG_IGN:  # `nohup` makes a process ignore SIGHUP
            signal.signal(number, _raise_for_signal)
    # Reopen closed standard streams; otherwise, the next opened file would be assigned the descriptor of a standard stream.
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # uses the lowest free descriptor
    if sys.stdout is None:
        sys.stdout = terminal.ClosedOutput()
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open to the end)
    unraisable = sys.unraisablehook
    sys.unraisablehook = partial(_signal_again, unraisable)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = partial(_show_warning, warnings.showwarning)
            code = _outcome()
    except KeyboardInterrupt:  # Ctrl-C arrived while another error was being reported
        code = 130
    except terminal.Terminated:
        code = 143
    finally:
        sys.unraisablehook = unraisable
    sys.exit(code)


def _signal_again(usual: Callable[..., None], dropped: Any) -> None:
    """Resend a signal whose exception was dropped by Python because it arrived while an object or generator was being finalized."""
    numbers = {KeyboardInterrupt: signal.SIGINT, terminal.Terminated: signal.SIGTERM}
    if dropped.exc_type not in numbers:
        usual(dropped)
        return
    _send_later(numbers[dropped.exc_type])  # because an exception raised inside this hook would also be dropped


def _send_later(number: int) -> None:
    """Send a signal to this process after a delay, which allows for busy machines, where a hook may take tens of milliseconds."""
    send = signal.raise_signal
    if os.name == "posix":  # on POSIX systems, `os.kill` also wakes up a waiting main thread
        send = partial(os.kill, os.getpid())
    again = threading.Timer(0.1, send, [number])
    again.daemon = True
    again.start()


def _show_warning(usual: Callable[..., None], message: Warning, category: type[Warning], *where, **more) -> None:
    """Print evoprune's own warnings in the style of its other messages. All other warnings are shown as usual."""
    if issubclass(category, EvopruneWarning):
        terminal.print_titled("warning:", str(message))
    else:
        usual(message, category, *where, **more)


def _outcome() -> int:
    """Run the command, report any error, and return the exit code."""
    streams = sys.stdout, sys.stderr
    remember(Typed())
    try:
        # In standalone mode, click would print errors in its own format. Commands return their exit codes.
        columns = min(shutil.get_terminal_size().columns, terminal.WIDTH)
        if _completes():
            # Otherwise, rich would wrap help text, and fish would offer each line as a completion.
            os.environ["COLUMNS"] = "1000"
        else:
            warn_of_unknown()
        try:
            code = app(standalone_mode=False, prog_name="evoprune", terminal_width=max(30, columns - 2)) or 0
        except typer.Abort as ended:  # raised by Typer for EOFError, and in some versions for Ctrl-C
            raise ended.__cause__ or KeyboardInterrupt from None
        sys.stdout.flush()
    except BrokenPipeError:
        code = _discard_output(streams)
    except SystemExit as ended:  # raised by Typer and rich if a pipe is closed, and by Typer after shell completion
        code = ended.code if _completes() else _discard_output(streams)
    except typer.Exit as done:
        code = done.exit_code
    except KeyboardInterrupt:
        code = 130
    except terminal.Terminated:
        code = 143
    except (Exception, ParserError) as problem:
        if code := _signal_code(problem):
            if code == 130:
                terminal.tell_stopped(problem)
            return code
        try:
            code = _report(problem)
        except BrokenPipeError:
            code = _discard_output(streams)
        except (OSError, UsageError) as unwritten:  # the error record couldn't be written
            unwritten.reported = True
            code = _report(unwritten)
    return code


def _signal_code(problem: BaseException) -> int | None:
    """Return the exit code for a signal that was converted to a different error, or None if there was no signal.

    While being imported, an extension module may convert a KeyboardInterrupt to an ImportError or SystemError. Python 3.11 converts
    it to a RuntimeError if it arrives while a class with a cached property is defined, because the property is told its name.
    """
    codes = {KeyboardInterrupt: 130, terminal.Terminated: 143}
    cause: BaseException | None = problem
    while cause and type(cause) not in codes:
        cause = cause.__cause__ or (cause.__context__ if isinstance(cause, (ImportError, SystemError)) else None)
    return codes.get(type(cause))


def _discard_output(streams) -> int:
    """Discard buffered output after the reader has closed the pipe, so the final flush doesn't fail. Returns exit code 0."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError):
            os.dup2(sink, stream.fileno())
    return 0


def _report(problem: Exception) -> int:
    """Print an error and its hint. With `--json`, also print an error record unless the command has already done so.

    Returns:
        The exit code.
    """
    terminal.print_traceback(problem)
    if isinstance(problem, OSError) and problem.errno in CANNOT_WRITE and problem.filename is None:
        _discard_output([sys.stdout])
        terminal.print_error(f"cannot write the output: {problem.strerror}", "is the disk full?")
        return UsageError.exit_code
    if isinstance(problem, ParserError):
        text = " ".join(problem.format_message().split()).rstrip(".")
        text = re.sub(r"Input should be a valid (integer|number), unable to parse .*", r"not a valid \1", text)
        text = re.sub(r"^Got unexpected extra arguments?(?:\(s\))? \((.*)\)$", r"unexpected extra words: \1", text)
        text = re.sub(r"^(No such command '.*')\. Did you mean.*", r"\1", text)  # the hint contains the suggestion
        text = re.sub(r" \(Possible options: .*\)$", "", text)
        text = text[:1].lower() + text[1:]  # as in evoprune's own messages
        from evoprune_cli.mistakes import hint_of

        commands = [*BUILT_IN, *plugged()] if typed().command is None else []
        problem = UsageError(text, hint_of(problem, _word(), commands))
    error = terminal.failure(problem)
    if typed().wants("json") and not getattr(problem, "reported", False):
        if schema := SCHEMAS.get(typed().command or _word()):
            terminal.print_document({"schema": schema, "error": error})
        elif typed().command != "profile":  # `profile` has --format json instead of --json
            asked = {"question": None, "answer": None, "finish_reason": "error"}  # there is no question yet
            terminal.print_document({"schema": SCHEMA, **asked, "error": error})
    terminal.print_error(error["message"], error["hint"])
    return error["code"]


def _word() -> str | None:
    """Return the word that the user typed in the place of a command: the first word other than an option."""
    return next((word for word in typed().words if not word.startswith("-")), None)
