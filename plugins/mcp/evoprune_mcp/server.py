"""Defines the MCP tools for agents, and reports errors and progress to the client."""

import asyncio
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ToolError, UnexpectedToolError
from mcp_types import Tool, ToolAnnotations
from pydantic import Field, StrictFloat, ValidationError

import evoprune
from evoprune.errors import DoesNotFit, OutOfMemory, error_record
from evoprune.util import listed, switched_on
from evoprune_cli import tell
from evoprune_mcp.advice import for_agents
from evoprune_mcp.folders import Listing
from evoprune_mcp.videos import Answered, Moments, Videos
from evoprune_mcp.worker import Report, Worker

TICK_S = 0.2  # minimum time between progress notifications, in seconds

# Tool arguments, with descriptions for the agents.
Path = Annotated[
    str,
    Field(
        description="A file, or a folder of frames: absolute, or relative to an allowed folder. list_videos finds them.",
        max_length=4096,
    ),
]
Paths = Annotated[
    list[Path], Field(description="Videos and images to ask about together. At most 32.", min_length=1, max_length=32)
]
Place = Annotated[
    str | None,
    Field(
        description="List only files below this folder: absolute, or relative to an allowed folder.", max_length=4096
    ),
]
Question = Annotated[str, Field(description="What to ask, in words.", max_length=100_000)]
Word = Annotated[str, Field(max_length=64)]
Time = Annotated[
    StrictFloat | Word | None, Field(description="Seconds, or a text such as 1:30; below 0: from the end.")
]
Budget = Annotated[
    StrictFloat | Word | None,
    Field(description="Share of visual tokens to keep: 0.25, or full, high, balanced, fast."),
]
Query = Annotated[str, Field(description="What to look for, such as: a red car.", max_length=10_000)]
LESS = "ask about fewer files, a shorter span (start and end), or with a lower budget"


class _Server(MCPServer):
    """An MCP server that rejects unknown tool arguments instead of ignoring them, and reports errors in evoprune's words."""

    async def list_tools(self) -> list[Tool]:
        tools = await super().list_tools()
        return [
            tool.model_copy(update={"input_schema": tool.input_schema | {"additionalProperties": False}})
            for tool in tools
        ]

    async def call_tool(self, name: str, arguments: dict[str, Any], context: Context | None = None) -> Any:
        tools = {tool.name: tool for tool in await self.list_tools()}
        if name not in tools:
            raise ToolError(f"there is no tool {name!r}\nhint: the tools are {listed([*tools])}")
        known = tools[name].input_schema["properties"]
        if unknown := [argument for argument in arguments if argument not in known]:
            raise ToolError(f"{name} has no argument {unknown[0]!r}\nhint: its arguments are {listed([*known])}")
        try:
            return await super().call_tool(name, arguments, context)
        except UnexpectedToolError:
            raise
        except ToolError as problem:
            message = str(problem).removeprefix(f"Error executing tool {name}: ")
            if isinstance(problem.__cause__, ValidationError):
                wrong = problem.__cause__.errors()[0]
                argument = str(wrong["loc"][0])
                message = f"{argument}: {wrong['msg']}\nhint: {known[argument].get('description', 'change it')}"
            raise ToolError(message) from problem


def make_server(videos: Videos, model: Worker, prober: Worker) -> MCPServer:
    """Create the MCP server with its tools. The server starts loading the model as soon as it runs.

    Args:
        videos: Answers the questions received by the tools.
        model: The worker thread for all jobs that use the model.
        prober: A second worker thread, which reads metadata even while the model is busy.
    """

    @asynccontextmanager
    async def start(_: MCPServer) -> AsyncIterator[None]:
        # Redirect library output to stderr, even after the server has shut down, because its threads may still be running. The
        # server itself has already opened the real stdout.
        sys.stdout = sys.stderr  # `real_streams` restores it
        model.submit(videos.load_early)
        yield

    server = _Server(
        "evoprune",
        version=evoprune.__version__,
        instructions=f"Answers questions about videos and images below {videos.folders}.",
        log_level="CRITICAL",
        lifespan=start,
    )
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)

    @server.tool(annotations=reads)
    async def list_videos(context: Context, folder: Place = None) -> Listing:
        """List the videos, images, and folders of frames that the other tools can read, with their sizes."""
        return await _result(context, prober, lambda report: videos.folders.listed(folder))

    @server.tool(annotations=reads)
    async def ask_video(
        context: Context,
        paths: Paths,
        question: Question,
        start: Time = None,
        end: Time = None,
        budget: Budget = None,
    ) -> Answered:
        """Ask a vision-language model about what can be seen. Further questions about the same files and times are fast."""
        return await _result(
            context, model, lambda report: videos.ask(report, paths, question, start, end, budget), LESS
        )

    @server.tool(annotations=reads)
    async def find_moments(context: Context, path: Path, query: Query) -> Moments:
        """Find when something can be seen in a video, the best match first. Times are in seconds."""
        return await _result(context, model, lambda report: videos.find(report, path, query))

    @server.tool(annotations=reads)
    async def describe_file(context: Context, path: Path) -> dict[str, Any]:
        """Say how long and how large a video or image is, and whether it has sound. Does not look at the frames."""
        return await _result(context, prober, lambda report: videos.describe(path))

    return server


async def _result(context: Context, worker: Worker, work: Callable[[Report], Any], less: str | None = None) -> Any:
    """Run a function in a worker thread while reporting its progress to the client. If the request is canceled, the job is too.

    Args:
        less: The hint if the inputs are too large for the memory or for the model.

    Raises:
        ToolError: If the function raises an exception.
    """
    job = worker.submit(work)
    future = asyncio.wrap_future(job.future)
    reported = -1.0
    try:
        while not future.done():
            await asyncio.wait([future], timeout=TICK_S)
            done, what = job.progress
            if done > reported:
                await context.report_progress(done, 1.0, what)
                reported = done
        return future.result()
    except asyncio.CancelledError:
        future.cancel()
        job.stop()
        raise
    except Exception as problem:
        raise ToolError(_told(problem, less)) from problem


def _told(problem: Exception, less: str | None) -> str:
    """Format an error as a message and a hint for the agent. Unexpected errors are also printed to stderr.

    Args:
        less: See `_result`.
    """
    record = error_record(problem)
    if record["type"] == "bug":
        tell(f"error: {record['message']}")
        if "--debug" in sys.argv or switched_on("EVOPRUNE_DEBUG"):
            traceback.print_exception(problem)
    hint = record["hint"]
    if less and isinstance(problem, OutOfMemory | DoesNotFit) and record["stage"] != "load":
        hint = less
    elif hint:
        hint = for_agents(hint) or f"ask the person who runs this server: {hint}"
    return "\nhint: ".join(filter(None, (record["message"], hint)))
