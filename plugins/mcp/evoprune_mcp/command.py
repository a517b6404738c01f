"""The `evoprune mcp` command. The `mcp` package and torch are only imported when it runs."""

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.session import FindOptions, ModelOptions, PruneOptions
from evoprune.video import SamplingOptions
from evoprune_cli import options as opt
from evoprune_cli import tell
from evoprune_mcp.folders import Folders, allow_open_files
from evoprune_mcp.videos import Videos
from evoprune_mcp.wire import end_at_once, real_streams
from evoprune_mcp.worker import Worker


@opt.command(
    *ModelOptions.LOADING,
    *PruneOptions.PRUNING,
    *SamplingOptions.RATE,
    *SamplingOptions.LIMITS,
    "decoder",
    "seek",
    *SamplingOptions.TEXT,
    *GenerationOptions.TOKENS,
    "system",
    "think",
    *FindOptions.FINDING,
    short="allow_dir model budget quantize fps frames max_new_tokens",
)
def mcp(
    *,
    allow_dir: opt.option(
        list[str] | None, "--allow-dir DIR", "Read videos and images below this folder; repeatable.", "Access"
    ) = None,
    options: opt.PipelineArguments,
    cache: opt.Cache = False,
    quiet: opt.Quiet = False,
) -> int:
    """Let an agent ask about videos (MCP).

    This is a Model Context Protocol server on stdin and stdout. The agent's program starts the server. The server exits
    at end of file on stdin.

    \b
    evoprune mcp --allow-dir ~/Videos
    evoprune mcp --allow-dir ~/Videos -m Qwen/Qwen2.5-VL-3B-Instruct
    """
    pipeline = options.parse()
    if not allow_dir:
        raise UsageError("no folder may be read", "name folders with videos: evoprune mcp --allow-dir DIR")
    videos = Videos(Folders(allow_dir), pipeline, cache, quiet)
    try:
        from evoprune_mcp.server import make_server
    except ImportError as problem:
        message = f"the command needs {problem.name}, which is not installed"
        raise UsageError(message, "install it in a checkout: pip install ./plugins/mcp") from problem
    allow_open_files()
    with real_streams() as received:
        if not quiet:
            tell(
                f"{pipeline.model.model} answers about files below {videos.folders}; Ctrl-C or the end of stdin ends it"
            )
        with Worker() as model, Worker() as prober:
            try:
                make_server(videos, model, prober).run("stdio")
            except* BrokenPipeError:
                pass  # the client has exited
        if model.busy or prober.busy:
            end_at_once(received)
    return 0
