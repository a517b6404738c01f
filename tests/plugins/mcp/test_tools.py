"""The tools of `evoprune mcp`, called by the client of the package `mcp`."""

import asyncio
import shutil
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from evoprune.language import GenerationOptions
from evoprune.session import ModelOptions, PipelineOptions
from evoprune.video import SamplingOptions, probe
from evoprune.video_qa import VideoQA
from evoprune_mcp.advice import for_agents
from evoprune_mcp.folders import Folders
from evoprune_mcp.videos import Videos
from tests.gguf_files import Folder
from tests.plugins.mcp.serving import COLOUR, ENCODES, REASON, SAMPLES, STOPPED, command
from tests.tiny import save_tiny

pytest.importorskip("mcp.server.mcpserver", reason=REASON)
WAIT_S = 60
LOAD_S = 600  # how long a server takes to load its model, if it is to take long


class Server:
    """A running MCP server and a client that is connected to it.

    Attributes:
        client: the asynchronous client, which is called through `portal`.
        folder: the folder that the server may read.
    """

    def __init__(self, portal, client, folder, log):
        self.portal = portal
        self.client = client
        self.folder = folder
        self._log = log

    def call(self, tool: str, **arguments):
        """Call a tool. Returns whether it failed, and the structured result or the error."""
        return outcome(self.portal.call(partial(self.client.call_tool, tool, arguments)))

    def start(self, tool: str, on_progress=None, **arguments):
        """Start to call a tool in the background. Returns a future, which may be cancelled."""
        call = partial(self.client.call_tool, tool, arguments, progress_callback=on_progress)
        return self.portal.start_task_soon(call)

    @property
    def log(self) -> str:
        return self._log.read_text("utf-8")

    def wait_for(self, text: str, times: int = 1) -> None:
        end = time.monotonic() + WAIT_S
        while self.log.count(text) < times:
            assert time.monotonic() < end, self.log
            time.sleep(0.02)


def outcome(result):
    if result.is_error:
        return True, result.content[0].text
    return False, result.structured_content


@contextmanager
def serving(folder, *options, **variables):
    """Start a server that may read a folder."""
    from anyio.from_thread import start_blocking_portal
    from mcp import Client, StdioServerParameters
    from mcp.client.stdio import stdio_client

    (program, *arguments), environment = command("--allow-dir", str(folder), *options, **variables)
    log = folder.parent / f"{folder.name}.log"
    with log.open("w") as errors, start_blocking_portal() as portal:
        started = stdio_client(StdioServerParameters(command=program, args=arguments, env=environment), errors)
        with portal.wrap_async_context_manager(Client(started)) as client:
            yield Server(portal, client, folder, log)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("allowed")
    for name in ("square.mp4", "vanish.webm", "arrivals.webm"):
        shutil.copy(SAMPLES / name, folder)
    for name in ("slow.mp4", "bug.mp4"):
        shutil.copy(SAMPLES / "square.mp4", folder / name)
    with serving(folder) as running:
        yield running


@pytest.fixture
def own(server):
    """A new folder below that of the server, for files that other tests do not use."""
    return Path(tempfile.mkdtemp(dir=server.folder))


@pytest.fixture(scope="module")
def qa():
    return VideoQA.load("demo")


def test_the_tools_and_where_files_are(server):
    listed = server.portal.call(server.client.list_tools).tools
    assert [tool.name for tool in listed] == ["list_videos", "ask_video", "find_moments", "describe_file"]
    assert all(tool.annotations.read_only_hint and tool.description for tool in listed)
    schemas = {tool.name: tool.input_schema for tool in listed}
    assert schemas["ask_video"]["required"] == ["paths", "question"]
    assert schemas["ask_video"]["properties"]["paths"]["maxItems"] == 32
    texts = [
        text
        for schema in schemas.values()
        for argument in schema["properties"].values()
        for text in (argument, argument.get("items", {}), *argument.get("anyOf", []))
        if text.get("type") == "string"
    ]
    assert len(texts) == 9 and all(text["maxLength"] <= 100_000 for text in texts)
    assert not any(tool.input_schema["additionalProperties"] for tool in listed)
    assert str(server.folder) in server.client.instructions


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"start_s": 1}, "ask_video has no argument 'start_s'\nhint: its arguments are paths, question, start"),
        (
            {"paths": "square.mp4"},
            "paths: Input should be a valid list\nhint: Videos and images to ask about together.",
        ),
        ({"budget": True}, "budget: Input should be a valid number\nhint: Share of visual tokens"),
        ({"start": False}, "start: Input should be a valid number\nhint: Seconds"),
        ({"question": " "}, "the question is empty\nhint: ask in words"),
        ({"question": "x" * 100_001}, "question: String should have at most 100000 characters\nhint: What to ask"),
        ({"paths": ["square.mp4"] * 33}, "paths: List should have at most 32 items"),
        ({"paths": ["x" * 5000]}, "paths: String should have at most 4096 characters"),
        ({"start": "1" * 1000}, "start: "),
    ],
)
def test_arguments_that_are_unknown_or_of_another_type_are_errors(server, wrong, problem):
    failed, message = server.call("ask_video", **{"paths": ["square.mp4"], "question": COLOUR} | wrong)
    assert failed and message.startswith(problem)


def test_moments_are_found_with_the_options_of_the_command(tmp_path, monkeypatch):
    """Also the options that `VideoQA.find` doesn't have."""
    from evoprune import moments

    samplings = []

    class Search(moments.Search):
        def __init__(self, session, source, queries, options, sampling, cache=None):
            samplings.append(sampling)
            super().__init__(session, source, queries, options, sampling, cache)

    monkeypatch.setattr(moments, "Search", Search)
    sampling = SamplingOptions(seek="exact", max_visual_tokens=24)
    options = replace(PipelineOptions(), model=ModelOptions("demo"), sampling=sampling)
    videos = Videos(Folders([str(SAMPLES)]), options, cache=False, quiet=True)
    assert videos.find(lambda *_: None, "vanish.webm", "a circle").moments and samplings == [sampling]


def test_a_gguf_file_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    text = Folder(save_tiny(tmp_path / "original")).write_pair(tmp_path / "models", kind="Q8_0")
    short = {"sampling": SamplingOptions(frames=2), "generation": GenerationOptions(max_new_tokens=2)}
    options = replace(PipelineOptions(), model=ModelOptions(str(text)), **short)
    videos = Videos(Folders([str(SAMPLES)]), options, cache=False, quiet=True)
    answered = videos.ask(lambda *_: None, ["square.mp4"], COLOUR, None, None, None)
    expected = VideoQA.load(str(text)).encode(SAMPLES / "square.mp4", frames=2).ask(COLOUR, max_new_tokens=2)
    assert answered.answer == expected.text


def test_tools_are_listed_before_the_model_is_loaded(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(SAMPLES / "square.mp4", folder)
    start = time.monotonic()
    with serving(folder, LOAD_S=str(LOAD_S)) as server:
        assert len(server.portal.call(server.client.list_tools).tools) == 4
        assert server.call("describe_file", path="square.mp4")[1]["duration_s"] == 6
    assert time.monotonic() - start < LOAD_S


def test_a_second_question_about_a_video_does_not_encode_it_again(server, own, qa):
    path = SAMPLES / "square.mp4"
    shutil.copy(path, own / "second.mp4")
    name = f"{own.name}/second.mp4"
    before = server.log.count(ENCODES)
    failed, first = server.call("ask_video", paths=[name], question=COLOUR)
    assert not failed and first == {"answer": "green", "cut": False, "reused": False, "warnings": []}
    happens = "What happens to the square?"
    failed, second = server.call("ask_video", paths=[str(own / "second.mp4")], question=happens)
    assert not failed and (second["answer"], second["reused"]) == (qa.ask(path, happens).text, True)
    assert server.log.count(ENCODES) == before + 1
    for more in ({"start": "0:01", "end": 3}, {"start": 1, "end": 3.0}, {"budget": "fast"}, {"budget": 1}):
        failed, other = server.call("ask_video", paths=[name], question=COLOUR, **more)
        assert not failed and (other["answer"], other["reused"]) == ("green", more == {"start": 1, "end": 3.0})
    assert server.log.count(ENCODES) == before + 4


def test_a_changed_file_is_encoded_again(server):
    shutil.copy(SAMPLES / "square.mp4", server.folder / "changing.mp4")
    for reused in (False, True):
        asked = server.call("ask_video", paths=["changing.mp4"], question="What happens?")
        assert asked[1]["reused"] == reused
    shutil.copy(SAMPLES / "flash.mp4", server.folder / "changing.mp4")
    assert not server.call("ask_video", paths=["changing.mp4"], question="What happens?")[1]["reused"]


def test_kept_encodings_make_room_for_another(server, own):
    shutil.copy(SAMPLES / "square.mp4", own / "large.mp4")
    large = f"{own.name}/large.mp4"
    for name, reused in (("square.mp4", None), (large, False), ("square.mp4", False), (large, True)):
        failed, asked = server.call("ask_video", paths=[name], question=COLOUR)
        assert not failed and asked["answer"] == "green" and reused in (None, asked["reused"])


def test_several_inputs_and_warnings(server):
    failed, asked = server.call("ask_video", paths=["square.mp4", "vanish.webm"], question=COLOUR)
    assert not failed and "demo" in asked["warnings"][0]


def test_an_answer_that_was_cut_says_so(server):
    with serving(server.folder, "-n", "1") as short:
        assert short.call("ask_video", paths=["square.mp4"], question=COLOUR)[1]["cut"]


def test_moments_are_those_that_video_qa_finds(server, qa):
    failed, found = server.call("find_moments", path="arrivals.webm", query="a red star")
    (moment,) = qa.find(SAMPLES / "arrivals.webm", "a red star")
    assert not failed
    assert found == {
        "moments": [{name: pytest.approx(value, abs=1e-3) for name, value in vars(moment).items() if name != "query"}]
    }


def test_a_file_is_described(server):
    failed, facts = server.call("describe_file", path="vanish.webm")
    video = probe(SAMPLES / "vanish.webm")
    assert not failed and (facts["kind"], facts["has_sound"], facts["duration_s"]) == ("video", False, video.duration_s)
    assert (facts["width"], facts["height"], facts["fps"]) == (video.width, video.height, video.fps)


def test_files_are_listed(server, own):
    shutil.copy(SAMPLES / "square.mp4", own / "listed.mp4")
    failed, listed = server.call("list_videos")
    names = [file["path"] for file in listed["files"]]
    assert not failed and not listed["more"] and {"square.mp4", f"{own.name}/listed.mp4"} <= set(names)
    failed, listed = server.call("list_videos", folder=own.name)
    size = (SAMPLES / "square.mp4").stat().st_size
    assert not failed and listed["files"] == [{"path": f"{own.name}/listed.mp4", "kind": "video", "size_bytes": size}]
    assert not server.call("describe_file", path=listed["files"][0]["path"])[0]
    failed, text = server.call("list_videos", folder="..")
    assert failed and "is no file below an allowed folder" in text


def test_hints_and_warnings_are_about_arguments_of_tools(server, own):
    """They don't advise the agent to use the command line."""
    (own / "text").mkdir()
    (own / "text" / "1.txt").write_text("no image")
    failed, text = server.call("describe_file", path=f"{own.name}/text")
    assert failed and "hint: files that count as images: .jpg" in text and "evoprune batch" not in text
    failed, asked = server.call("ask_video", paths=["square.mp4"], question=COLOUR + " x" * 40_000)
    assert failed and asked.endswith(
        "\nhint: ask about fewer files, a shorter span (start and end), or with a lower budget"
    )
    for text, adapted in (
        ("choose a later part: --start, --end", "choose a later part: start, end"),
        ("re-encode it, e.g. with ffmpeg -i IN OUT.mp4", "re-encode it"),
        ("it was cut: it reached the limit, -n (max_new_tokens)", "it was cut: it reached the limit"),
        ("its answer is meaningless. For a real answer: --model=x", "its answer is meaningless."),
        ("give a video file; - reads one from standard input", "give a video file"),
        ("leave out --think", ""),
    ):
        assert for_agents(text) == adapted


def test_files_outside_are_refused(server, own, tmp_path):
    shutil.copy(SAMPLES / "square.mp4", tmp_path / "outside.mp4")
    (own / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (own / "frames").mkdir()
    (own / "frames" / "1.png").symlink_to(tmp_path / "outside.png")
    (own / "sub").symlink_to(tmp_path)
    (own / "circle.mp4").symlink_to(own / "circle.mp4")
    names = [
        f"{own.name}/link.mp4",
        f"{own.name}/frames",
        f"{own.name}/sub/outside.mp4",
        f"{own.name}/circle.mp4",
        "missing.mp4",
        "../x.mp4",
        "http://127.0.0.1/x.mp4",
        "a\0b",
    ]
    for path in [*names, str(tmp_path / "outside.mp4"), "/etc/passwd", "~/x.mp4"]:
        for tool, arguments in (
            ("ask_video", {"paths": ["square.mp4", path], "question": COLOUR}),
            ("find_moments", {"path": path, "query": "a star"}),
            ("describe_file", {"path": path}),
        ):
            failed, text = server.call(tool, **arguments)
            assert failed and "is no file below an allowed folder" in text and "\nhint: " in text, (path, text)
    (own / "inside.mp4").symlink_to(server.folder / "square.mp4")
    described = server.call("describe_file", path=f"{own.name}/inside.mp4")[1]
    assert described["path"] == str(server.folder / "square.mp4")


def test_bad_arguments_and_files_are_errors_with_hints(server, own):
    (server.folder / "text.mp4").write_text("no video")
    (own / "empty").mkdir()
    asked = {"paths": ["square.mp4"], "question": COLOUR}
    for tool, arguments, says in (
        ("ask_video", asked | {"paths": ["text.mp4"]}, "is not a video"),
        ("ask_video", asked | {"paths": [f"{own.name}/empty"]}, "hint: "),
        ("describe_file", {"path": "text.mp4"}, "is not a video"),
        ("ask_video", asked | {"question": " "}, "the question is empty"),
        ("ask_video", asked | {"budget": 7}, "did you mean 0.07"),
        ("ask_video", asked | {"budget": "much"}, "hint: "),
        ("ask_video", asked | {"start": "soon"}, "hint: "),
        ("ask_video", asked | {"start": 5, "end": 2}, "hint: "),
        ("ask_video", asked | {"paths": []}, "paths"),
        ("ask_video", asked | {"paths": 3}, "paths"),
        ("ask_video", {"paths": ["square.mp4"]}, "question"),
        ("find_moments", {"path": "arrivals.webm", "query": ""}, "hint: "),
    ):
        failed, text = server.call(tool, **arguments)
        assert failed and says in text, (arguments, text)
    assert "Traceback" not in server.log


def test_an_unexpected_error_is_one_line_on_stderr(server):
    failed, text = server.call("ask_video", paths=["bug.mp4"], question=COLOUR)
    assert failed and "RuntimeError: a bug" in text and "and more" not in text
    assert "error: RuntimeError: a bug\n" in server.log and "Traceback" not in server.log


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_tool(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    shutil.copy(SAMPLES / "square.mp4", folder)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with serving(folder, "-m", str(tmp_path / "model")) as server:
        failed, text = server.call("ask_video", paths=["square.mp4"], question=COLOUR)
        assert failed and "\nhint: " in text
        assert not server.call("describe_file", path="square.mp4")[0]
        server.wait_for("error: ")


def test_progress_arrives_and_grows_and_a_cancelled_request_stops(server):
    seen = []

    async def on_progress(done, total, message):
        seen.append((done, total, message))

    before = server.log.count(STOPPED)
    slow = server.start("ask_video", on_progress, paths=["slow.mp4"], question=COLOUR)
    end = time.monotonic() + WAIT_S
    while sum("reading, frame" in message for _, _, message in seen) < 3:
        assert time.monotonic() < end
        time.sleep(0.02)
    shares = [done for done, _, _ in seen]
    assert shares == sorted(set(shares)) and {total for _, total, _ in seen} == {1.0}
    assert not server.call("describe_file", path="square.mp4")[0]  # while the model is busy
    slow.cancel()
    server.wait_for(STOPPED, before + 1)
    assert server.call("ask_video", paths=["square.mp4"], question=COLOUR)[1]["answer"] == "green"


def test_requests_wait_for_each_other_and_may_be_cancelled_before_their_turn(server, own):
    shutil.copy(SAMPLES / "square.mp4", own / "both.mp4")
    both = f"{own.name}/both.mp4"
    stopped = server.log.count(STOPPED)
    encoded = server.log.count(ENCODES)
    slow = server.start("ask_video", paths=["slow.mp4"], question=COLOUR)
    server.wait_for(ENCODES, encoded + 1)
    waiting = [server.start("ask_video", paths=[name], question=COLOUR) for name in ("slow.mp4", both, both)]
    time.sleep(0.5)
    assert not any(call.done() for call in waiting)
    waiting[0].cancel()
    slow.cancel()
    server.wait_for(STOPPED, stopped + 1)
    first, second = (outcome(call.result(WAIT_S))[1] for call in waiting[1:])
    assert first["answer"] == second["answer"] == "green" and (first["reused"], second["reused"]) == (False, True)
    assert server.log.count(ENCODES) == encoded + 2


def test_what_libraries_print_is_not_on_stdout(server):
    server.wait_for("what a library prints")


def test_the_client_s_own_time_limit_stops_a_request(server):
    encoded, stopped = server.log.count(ENCODES), server.log.count(STOPPED)

    async def impatient():
        call = asyncio.create_task(server.client.call_tool("ask_video", {"paths": ["slow.mp4"], "question": COLOUR}))
        await asyncio.to_thread(server.wait_for, ENCODES, encoded + 1)  # a new server loads the model first
        await asyncio.wait_for(call, timeout=0.1)

    with pytest.raises(TimeoutError):
        server.portal.call(impatient)
    server.wait_for(STOPPED, stopped + 1)
