"""The `evoprune serve` command. Its dependencies are only imported when it runs."""

import errno
import gc
import logging
import os
import re
import secrets
import socket
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from evoprune.errors import OutOfMemory, UsageError
from evoprune.language import GenerationOptions
from evoprune.session import ModelOptions, PipelineOptions, PruneOptions
from evoprune.util import cannot_read, counted, in_a_thread, missing_hint, parse_time
from evoprune.video import SamplingOptions, warm_up
from evoprune_cli import load, prepare, progress, tell, typed
from evoprune_cli import options as opt

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from evoprune.session import ModelDescription
    from evoprune.video_qa import VideoQA
    from evoprune_serve.guard import Access

SERVER = "Server"
ACCESS = "Access"
LIMITS = "Limits"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
ANY = ("0.0.0.0", "::")  # for comparison only  # noqa: S104
KEY = "EVOPRUNE_API_KEY"
KEY_FILE = "choose a file that contains only the key"
MIB = 2**20
BACKLOG = 512  # maximum number of connections waiting to be accepted
KEPT = 8  # number of encoded videos to keep by default
UNTAKEN_S = 60  # maximum time without acknowledgment of response data by a client, in seconds


@dataclass(frozen=True, kw_only=True)
class ServeArguments:
    """The arguments of `evoprune serve`."""

    host: opt.option(str, "--host ADDRESS", "Address to listen on; any except 127.0.0.1 needs a key.", SERVER) = (
        LOOPBACK[0]
    )
    port: opt.option(int, "-p --port N", "Port to listen on; 0 picks a free one.", SERVER, min=0, max=65535) = 8000
    socket: opt.option(
        bool,
        "--socket",
        "Listen on a Unix socket that only you can open, instead of an address. evoprune ask --via auto asks this server.",
        SERVER,
    ) = False
    detach: opt.option(
        bool, "--detach", "Like --socket, but in the background: return as soon as the models are loaded.", SERVER
    ) = False
    stop: opt.option(bool, "--stop", "End the server that --detach or --socket started.", SERVER) = False
    name: opt.option(
        list[str] | None,
        "--name TEXT",
        "Name of the model in the API; default: its ID, or the name of its folder or file. Repeat it for --also, in order.",
        SERVER,
    ) = None
    also: opt.option(
        list[str] | None,
        "--also ID|DIR|demo",
        "Another model that requests may name, loaded with the same options; repeatable.",
        SERVER,
    ) = None
    api_key: opt.option(
        str | None,
        "--api-key TEXT",
        f"Key that every request must send; other users of this machine may see it.  [env var: {KEY}]",
        ACCESS,
    ) = None
    api_key_file: opt.option(str | None, "--api-key-file FILE", "File that contains the key.", ACCESS) = None
    no_auth: opt.option(bool, "--no-auth", "Serve other machines without a key.", ACCESS) = False
    allow_urls: opt.option(
        bool, "--allow-urls", "Read http and https URLs, except private and local addresses.", ACCESS
    ) = False
    allow_dir: opt.option(
        list[str] | None,
        "--allow-dir DIR",
        "Read files below this folder, as file:///DIR/clip.mp4; repeatable.",
        ACCESS,
    ) = None
    allow_host: opt.option(
        list[str] | None, "--allow-host NAME", "Another host name of this server; repeatable.", ACCESS
    ) = None
    cors: opt.option(
        list[str] | None,
        "--cors ORIGIN",
        "Allow requests from pages of this origin, such as https://example.org; repeatable.",
        ACCESS,
    ) = None
    queue: opt.option(int, "--queue N", "Maximum number of waiting requests; more get error 429.", LIMITS, min=1) = 32
    keep: opt.option(
        list[str] | None,
        "--keep N|TIME",
        f"N: encoded videos to keep for further questions; default: {KEPT}. TIME, such as 10m: end the server when there has been "
        "no request for so long. Repeatable, for both.",
        LIMITS,
    ) = None
    timeout: opt.option(str, "--timeout TIME", "Maximum time from a request to the end of its answer.", LIMITS) = "10m"
    max_body: opt.option(int, "--max-body MIB", "Maximum size of a request, including its videos.", LIMITS, min=1) = 64
    max_upload: opt.option(
        int, "--max-upload MIB", "Maximum size of an uploaded or downloaded file.", LIMITS, min=1
    ) = 2048
    max_files: opt.option(
        int, "--max-files MIB", "Maximum total size of the files that clients sent.", LIMITS, min=1
    ) = 8192
    file_age: opt.option(str, "--file-age TIME", "How long to keep an uploaded file.", LIMITS) = "24h"
    options: opt.PipelineArguments
    log_contents: opt.option(bool, "--log-contents", "Also log questions and answers.", opt.OUTPUT) = False
    quiet: opt.option(
        bool, "-q --quiet", "Print only warnings and errors, and the address if --port is 0.", opt.OUTPUT
    ) = False


@opt.command(
    *ModelOptions.LOADING,
    *PruneOptions.PRUNING,
    *SamplingOptions.RATE,
    *SamplingOptions.LIMITS,
    "decoder",
    "seek",
    "speech",
    *GenerationOptions.TOKENS,
    "think",
    short="host port model budget quantize allow_urls allow_dir api_key_file no_auth",
)
def serve(given: ServeArguments) -> int:
    """Serve one or several models over OpenAI's protocol.

    \b
    evoprune serve
    evoprune serve -m Qwen/Qwen2.5-VL-3B-Instruct --allow-dir ~/videos
    evoprune serve --detach --keep 10m
    EVOPRUNE_API_KEY=secret evoprune serve --host 0.0.0.0 --allow-urls
    """
    if given.stop:
        return _stop(given)
    pipeline = given.options.parse()
    access, limits = _check(given, pipeline)
    if given.detach:
        return _detach(given)
    warm_up()  # warms up while this process imports its dependencies
    return _run(given, pipeline, access, limits)


@dataclass(frozen=True)
class Limits:
    """Checked values of options: times in seconds, folders that requests may name, and the number of encodings to keep.

    `idle_s` is the time without requests after which the server ends, or None.
    """

    answer_s: float
    age_s: float
    folders: tuple[Path, ...]
    keep: int
    idle_s: float | None


def _check(given: ServeArguments, pipeline: PipelineOptions) -> "tuple[Access, Limits]":
    """Return who may use the server, and the limits of requests."""
    key = _key(given.api_key, given.api_key_file)
    if given.host not in LOOPBACK and key is None and not given.no_auth:
        hint = f"--api-key-file FILE, or {KEY}; --no-auth serves everyone without a key"
        raise UsageError(f"--host {given.host} serves other machines, and there is no key", hint)
    if given.allow_urls and pipeline.model.offline:
        raise UsageError("--allow-urls and --offline cannot be combined", "leave out one of the two")
    if given.socket or given.detach:
        _check_no_address()
    keep, idle_s = _keep(given.keep or ())
    limits = Limits(
        _above_0("--timeout", given.timeout),
        _above_0("--file-age", given.file_age),
        tuple(map(_folder, given.allow_dir or ())),
        keep,
        idle_s,
    )
    origins = tuple(map(_origin, given.cors or ()))
    try:
        from evoprune_serve.guard import LOOPBACK as NAMES
        from evoprune_serve.guard import Access
    except ImportError as problem:
        raise _missing(problem) from problem
    hosts = (*NAMES, _in_url(given.host).lower(), *(each.lower() for each in given.allow_host or ()))
    if given.host in ANY and key is not None and not given.allow_host:
        hosts = ()  # this machine's names are unknown, and pages on other sites can't know the key
    access = Access(
        key=key,
        hosts=hosts,
        origins=origins,
        body_bytes=given.max_body * MIB,
        bodies_bytes=max(128, 2 * given.max_body) * MIB,
        upload_bytes=given.max_upload * MIB,
    )
    return access, limits


def _keep(typed_values: Sequence[str]) -> tuple[int, float | None]:
    """Return the number of encodings to keep, and the time without requests after which the server ends, or None."""
    keep, idle_s = KEPT, None
    for text in typed_values:
        if text.isdecimal() and text.isascii():
            keep = int(text)
        else:
            idle_s = _above_0("--keep", text)
    return keep, idle_s


def _check_no_address() -> None:
    """Raise UsageError if an option for a server at an address is given."""
    flags = typed().options()
    for name in ("host", "port", "allow_host", "cors", "api_key", "api_key_file", "no_auth"):
        if name in flags:
            hint = "leave it out, or leave out --socket and --detach"
            raise UsageError(f"{flags[name]} is for a server at an address, not at a socket", hint)


def _detach(given: ServeArguments) -> int:
    """Start this command in the background, with a socket."""
    from evoprune_serve.background import Failed, detach

    words = [word for word in typed().words if word not in ("--detach", "--socket")]
    try:
        with progress(not given.quiet) as show:
            number = detach(["--socket", *words], show)
    except Failed as failed:
        print(failed.log, end="", file=sys.stderr)
        return failed.code if failed.code > 0 else 1
    if not given.quiet:
        hint = "evoprune ask --via auto asks it, evoprune serve --stop ends it"
        tell(f"the server runs in the background (process {number}); {hint}")
    return 0


def _stop(given: ServeArguments) -> int:
    """End the server in the background."""
    from evoprune_serve.background import stop

    if given.detach or given.socket:
        raise UsageError("--stop cannot be combined with --detach or --socket", "run the command twice")
    number = stop()
    if not given.quiet:
        tell("no server runs in the background" if number is None else f"the server has ended (process {number})")
    return 0


def _run(given: ServeArguments, pipeline: PipelineOptions, access: "Access", limits: Limits) -> int:
    """Listen, load the models, and serve them until a signal arrives."""
    try:
        import_module("uvicorn")
        from evoprune_serve.loading import answering
        from evoprune_serve.store import private_folder
    except ImportError as problem:
        raise _missing(problem) from problem
    with ExitStack() as stack:
        if given.socket:
            ready, listening = _own_socket(stack)
        else:
            ready, listening = _say_nothing, _listening(given.host, given.port)
        stack.enter_context(listening)
        folder = stack.enter_context(private_folder())
        with progress(not given.quiet) as show, answering(listening) as waiting:
            try:
                # Importing torch in the main thread would swallow exceptions raised by signal handlers. The main thread must not
                # compute anything either, so that only the model thread has a group of OpenMP workers. With a second group, there
                # would be more threads than cores, so libgomp would put the workers to sleep between operations.
                in_a_thread(partial(import_module, "evoprune_serve.app"), "evoprune-load")
                from evoprune_serve.app import Settings, make_app
            except ImportError as problem:
                raise _missing(problem) from problem
            names, also = given.name or (), given.also or ()
            models = in_a_thread(partial(_loaded, names, pipeline, also, show, given.quiet), "evoprune-load")
        settings = Settings(
            folder=folder,
            usual=pipeline,
            access=access,
            urls=given.allow_urls,
            folders=limits.folders,
            files_bytes=given.max_files * MIB,
            file_age_s=limits.age_s,
            most=given.queue,
            keep=limits.keep,
            answer_s=limits.answer_s,
            log=_say_nothing if given.quiet else tell,
            log_contents=given.log_contents,
        )
        ready()
        _serve(given, make_app(models, settings), [*models], listening, waiting, limits.idle_s)
    return 0


def _own_socket(stack: ExitStack) -> "tuple[Callable[[], None], socket.socket]":
    """Listen on this user's socket until the stack is closed.

    Returns:
        The function to call when the models are loaded, and the socket.

    Raises:
        UsageError: If there is already a server.
    """
    from evoprune_cli import Background
    from evoprune_serve.background import listen

    background = Background()
    ready = stack.enter_context(background.held())
    return ready, listen(background, BACKLOG)


def _serve(
    given: ServeArguments,
    app: "Starlette",
    names: Sequence[str],
    listening: socket.socket,
    waiting: list[socket.socket],
    idle_s: float | None,
) -> None:
    """Serve the application until a signal arrives, or until there has been no request for `idle_s`.

    `waiting` are connections that were accepted while the models loaded.
    """
    import uvicorn

    from evoprune_serve.connections import Connection
    from evoprune_serve.ending import CLOSING_S, EndingServer

    for library in ("uvicorn.error", "python_multipart"):  # they would log a warning for every malformed request
        logging.getLogger(library).setLevel(logging.ERROR)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # otherwise, clients could impersonate each other
        timeout_graceful_shutdown=CLOSING_S,
    )
    # With torch and the models, a full garbage collection would block the event loop for more than 100 ms.
    gc.collect()
    gc.freeze()
    if not given.quiet or given.port == 0:  # a port that the system picked is known only from here
        verb = "is" if len(names) == 1 else "are"
        ends = "evoprune serve --stop" if given.socket else "Ctrl-C"
        if given.socket:
            where = f"{listening.getsockname()} (evoprune ask --via auto)"
        else:
            page = f"http://{_in_url(given.host)}:{listening.getsockname()[1]}/"
            where = f"{page} (API: {page}v1)"
        tell(f"{' and '.join(names)} {verb} served at {where}; {ends} ends it")
    EndingServer(config, app.state.server.work, waiting, app.state.activity, idle_s).run(sockets=[listening])


def _say_nothing(*_: str) -> None:
    pass


def _loaded(
    names: Sequence[str], usual: PipelineOptions, also: Sequence[str], show: Callable[..., None], quiet: bool
) -> "dict[str, VideoQA]":
    """Load all of the server's models and return them by name. `names` overrides the names of the first models.

    Raises:
        UsageError: If two models have the same name, or there are more names than models.
        OutOfMemory: If the models together don't fit in memory.

    For the other exceptions, see `load`.
    """
    options = [usual, *(replace(usual, model=replace(usual.model, model=model, revision=None)) for model in also)]
    if len(names) > len(options):
        raise UsageError(f"there are {len(names)} names for {counted(len(options), 'model')}", "--also adds models")
    called = [*names, *(_name(each.model.model) for each in options[len(names) :])]
    for each, count in Counter(called).items():
        if count > 1:
            hint = "--name, repeated in the order of -m and --also, gives them other names"
            raise UsageError(f"{count} models are called {each}", hint)
    described = _described([each.model for each in options]) if also else [None]
    from evoprune.video_qa import VideoQA

    sessions = [load(one, show, quiet, model=model) for one, model in zip(options, described, strict=True)]
    return {name: VideoQA(session) for name, session in zip(called, sessions, strict=True)}


def _described(models: Sequence[ModelOptions]) -> "list[ModelDescription]":
    """Return the model descriptions after checking that all models fit in memory together.

    Raises:
        OutOfMemory: If the models' combined weights don't fit in memory.
        ModelError: If a model doesn't exist.
    """
    prepare()
    from evoprune.backend import Device, Quantization
    from evoprune.session import describe, weights_of
    from evoprune.util import size

    described = [describe(each) for each in models]
    weights = [weights_of(each) for each in described]
    device = weights[0].device
    if short := Device(device).shortage(sum(each.bytes for each in weights)):
        names = " and ".join(each.id for each in described)
        hint = "serve fewer or smaller models"
        for kind in Quantization.kinds(device) if all(each.can_be_quantized for each in described) else ():
            needed = sum(each.bytes_as(each.description.dtype, kind) for each in weights)
            if not Device(device).shortage(needed):
                hint += f"; --quantize {kind} needs about {size(needed)} for the weights"
        raise OutOfMemory(f"{names} {short}", hint, stage="load")
    return described


def _key(given: str | None, path: str | None) -> str | None:
    """Return the API key from the command line, a file, or the environment, or None if no key is set.

    Raises:
        UsageError: If the key is invalid, the file can't be read, or both options are given.
    """
    if given is not None and path is not None:
        raise UsageError("--api-key and --api-key-file cannot be combined", "give one of the two")
    key = given
    if path is not None:
        try:
            key = Path(path).read_text(encoding="utf-8").strip()
        except OSError as problem:
            raise UsageError(cannot_read(path, problem), missing_hint(path, KEY_FILE)) from problem
        except UnicodeDecodeError as problem:
            raise UsageError(f"cannot read {path}: it is not UTF-8", KEY_FILE) from problem
    if key is None:
        key = os.environ.get(KEY) or None
    if key is not None and not (key.isascii() and key.isprintable() and len(key.split()) == 1):
        hint = f"letters and digits, for example {secrets.token_urlsafe(24)}"
        raise UsageError("the API key is not one word of ASCII", hint)
    return key


def _name(model: str) -> str:
    """Return a model's public name. For a folder or file, this is only the last path component, so the full path stays private."""
    path = Path(model).expanduser()
    if os.path.isdir(path):
        return path.resolve().name
    return path.name if os.path.isfile(path) else model


def _above_0(flag: str, text: str) -> float:
    seconds = parse_time(text)
    if seconds <= 0:
        raise UsageError(f"{flag} {text} is not above 0", "use a time above 0")
    return seconds


def _origin(text: str) -> str:
    """Normalize a web page's origin to the format sent by browsers.

    Raises:
        UsageError: If the text isn't an origin.
    """
    origin = text.rstrip("/").lower()
    if not re.fullmatch(r"https?://[^/\s*]+", origin):
        raise UsageError(f"--cors {text} is no origin", "give scheme, name and port, such as https://example.org")
    return origin


def _folder(path: str) -> Path:
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UsageError(f"--allow-dir {path} is not a folder", missing_hint(path, "give a folder that exists"))
    return folder


def _listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the given host and port.

    Raises:
        UsageError: If the server can't listen on this address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Specify the protocol; otherwise, asyncio doesn't disable Nagle's algorithm, which delays parts of an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on POSIX systems, this allows reusing the port of a server that just exited
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # available on Linux; accepted connections inherit it
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * UNTAKEN_S)
        listening.bind((host, port))
        listening.listen(BACKLOG)
    except (OSError, OverflowError) as problem:
        listening.close()
        reason = getattr(problem, "strerror", None) or problem
        raise UsageError(f"cannot listen at {host}:{port}: {reason}", _listening_hint(problem, port)) from problem
    return listening


def _listening_hint(problem: Exception, port: int) -> str:
    number = getattr(problem, "errno", None)
    if number == errno.EADDRINUSE:
        return f"is evoprune serve already running there? use it, stop it (lsof -i :{port} shows it), or use --port {port + 1}"
    if number == errno.EACCES and port < 1024:
        return "ports below 1024 need special rights; choose another --port, such as 8000"
    return "choose another --port or --host"


def _missing(problem: ImportError) -> UsageError:
    """Return the error for a package that the server needs."""
    return UsageError(
        f"the server needs {problem.name}, which is not installed",
        "in a checkout of evoprune: pip install ./plugins/serve",
    )


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
