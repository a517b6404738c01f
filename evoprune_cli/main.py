"""The `evoprune` command: its subcommands, and what every one of them does about errors, signals and closed pipes."""

import contextlib
import os
import signal
import sys
import traceback

import typer

import evoprune
from evoprune.errors import UsageError, error_record
from evoprune_cli.ask import ask
from evoprune_cli.inspect import inspect
from evoprune_cli.render import print_error, print_json

# What the parser raises. Typer carries click inside in some versions and beside it in others, so ask the class it exports.
ParserError = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException")

app = typer.Typer(
    name="evoprune",
    help="Ask Qwen2.5-VL about videos; visual tokens are pruned inside the vision encoder.",
    epilog="Exit codes: 0 done, 1 a bug, 2 usage, 3 video, 4 model, 5 out of memory, 130 interrupted, 143 terminated.",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evoprune {evoprune.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    if context.invoked_subcommand is None:
        with contextlib.redirect_stdout(sys.stderr):  # with rich, help is printed as it is made
            sys.stderr.write(context.get_help())
        raise typer.Exit(2)


app.command()(ask)
app.command()(inspect)


class Terminated(BaseException):
    """SIGTERM, as an exception, so that what there is gets printed and files get closed."""


def _terminate(*_) -> None:
    raise Terminated


def run() -> None:
    """Runs the command line and exits with a documented code; a traceback is for `--debug` or EVOPRUNE_DEBUG=1."""
    signal.signal(signal.SIGTERM, _terminate)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # started with the stream closed
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open to the end)
    streams = sys.stdout, sys.stderr
    try:
        # Not "standalone": then click would print errors its own way. Commands return their exit code.
        code = app(standalone_mode=False, prog_name="evoprune") or 0
        sys.stdout.flush()
    except BrokenPipeError:
        code = _nobody_reads(streams)
    except SystemExit:  # Typer's and rich's way with a closed pipe; nothing here exits like that
        code = _nobody_reads(streams)
    except typer.Exit as done:
        code = done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Terminated:
        code = 143
    except (Exception, ParserError) as problem:
        try:
            code = _report(problem)
        except BrokenPipeError:
            code = _nobody_reads(streams)
    sys.exit(code)


def _nobody_reads(streams) -> int:
    """Whoever read has had enough: that is no error. What is still buffered goes nowhere, or the last flush would fail."""
    sink = os.open(os.devnull, os.O_WRONLY)
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
            continue
        with contextlib.suppress(OSError, ValueError):
            os.dup2(sink, stream.fileno())
    return 0


def _report(problem: Exception) -> int:
    """The two lines of an error, and for `--json` a line on stdout unless the command has written it; the exit code."""
    if debugging():
        traceback.print_exception(problem)
    told = getattr(problem, "told", False)
    if isinstance(problem, ParserError):
        problem = UsageError(_sentence(problem), _hint(problem))
    error = error_record(problem)
    if "--json" in sys.argv[1:] and not told:
        from evoprune.report import Report

        print_json(Report(finish_reason="error", error=error))
    print_error(error["message"], error["hint"])
    return error["code"]


def debugging() -> bool:
    return "--debug" in sys.argv[1:] or os.environ.get("EVOPRUNE_DEBUG", "") not in ("", "0")


def _sentence(problem: Exception) -> str:
    return " ".join(problem.format_message().split()).rstrip(".")


def _hint(problem: Exception) -> str:
    if "unexpected extra argument" in problem.format_message():
        return 'quote the question: evoprune ask video.mp4 "What happens?"'
    if "No such command" in problem.format_message() and os.path.exists(problem.format_message().split("'")[1]):
        return 'to ask about a video: evoprune ask video.mp4 "What happens?"'
    context = getattr(problem, "ctx", None)
    return f"see {context.command_path if context else 'evoprune'} --help"
