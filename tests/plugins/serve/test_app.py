"""The server over HTTP, in this process: the answers are the same as from `VideoQA`, and errors have OpenAI's form."""

import base64
import errno
import gc
import io
import itertools
import json
import math
import os
import socket
import tempfile
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from queue import SimpleQueue
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evoprune.session import OpenInputs, encoding
from evoprune.video_qa import VideoQA
from tests.gguf_files import Folder
from tests.plugins.serve.serving import (
    CHAT,
    COLOUR,
    REASON,
    SAMPLES,
    body,
    memory_fails,
    message,
    picture,
    serving,
    url_of,
    video,
)
from tests.speech import write_sounding
from tests.tiny import save_tiny

pytest.importorskip("starlette", reason=REASON)
httpx = pytest.importorskip("httpx", reason=REASON)
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


def answer(server, **given) -> dict:
    response = server.client.post(CHAT, json=body(**given))
    assert response.status_code == 200, response.text
    return response.json()


def text_of(reply: dict) -> str:
    return reply["choices"][0]["message"]["content"]


def error(server, status: int, **given) -> dict:
    response = server.client.post(CHAT, json=body(**given))
    assert response.status_code == status, response.text
    return response.json()["error"]


def events(server, **given) -> list[dict]:
    """Return the events of a stream, and check that the last one marks its end."""
    with server.client.stream("POST", CHAT, json=body(stream=True, **given)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def file_url(name: str = "square.mp4") -> str:
    return (SAMPLES / name).as_uri()


def test_answers_and_counts_are_those_of_video_qa(server, qa):
    for name, question in (("square.mp4", COLOUR), ("three.mp4", "How many shapes are there?")):
        right = qa.encode(SAMPLES / name).ask(question)
        reply = answer(server, question=question, name=name)
        assert text_of(reply) == right.text
        assert reply["choices"][0]["finish_reason"] == right.report.finish_reason == "stop"
        usage = reply["usage"]
        assert usage["prompt_tokens"] == right.report.tokens.prompt
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        pruning = right.report.pruning
        assert usage["evoprune"]["visual_tokens_in"] == pruning.visual_tokens_in
        assert usage["evoprune"]["visual_tokens_kept"] == pruning.visual_tokens_kept
        assert usage["evoprune"]["frames"] == [right.report.sampling.frames]
        assert usage["evoprune"]["time_ms"]["encode"] > 0


def test_options_of_a_request(server, qa):
    other = qa.__class__(qa.loaded, budget=0.1, method="divprune")
    video = other.encode(SAMPLES / "pan.mp4", frames=8, start_s=1.0, seek="exact")
    drawn = {"temperature": 1.5, "max_new_tokens": 6}
    right = video.ask("What digit is it?", seed=5, system="Be brief.", **drawn)
    given = body(
        "What digit is it?", "pan.mp4", budget=0.1, method="divprune", frames=8, start=1, seek="exact", temperature=1.5,
        max_tokens=6, seed=5,
    )  # fmt: skip
    given["messages"].insert(0, {"role": "system", "content": "Be brief."})
    reply = server.client.post(CHAT, json=given).json()
    assert text_of(reply) == right.text
    assert reply["usage"]["evoprune"]["visual_tokens_kept"] == right.report.pruning.visual_tokens_kept


def test_speech_is_transcribed(qa, tmp_path, speech_model, monkeypatch):
    write_sounding(tmp_path / "talk.mp4", 4.0, [(1.0, 3.0)])
    monkeypatch.setattr("evoprune.session.speech.AUTO", speech_model)
    right = qa.encode(tmp_path / "talk.mp4", speech=speech_model).ask(COLOUR)
    asked = {"messages": [message(COLOUR, video((tmp_path / "talk.mp4").as_uri()))]}
    with serving(qa, tmp_path, folders=(tmp_path,)) as server:
        replies = [server.client.post(CHAT, json=asked | {"speech": name}).json() for name in ("auto", "none")]
    assert text_of(replies[0]) == right.text
    heard, unheard = (reply["usage"]["prompt_tokens"] for reply in replies)
    assert heard == right.report.tokens.prompt > unheard
    assert replies[0]["usage"]["evoprune"]["time_ms"]["speech"] > 0


def test_a_stream_is_the_answer_in_pieces(server):
    whole = answer(server, question="What happens to the square?")
    chunks = events(server, question="What happens to the square?", stream_options={"include_usage": True})
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"} and len({c["id"] for c in chunks}) == 1
    *pieces, counts = chunks
    assert pieces[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == text_of(whole)
    assert [piece["choices"][0]["finish_reason"] for piece in pieces[-2:]] == [None, "stop"]
    assert counts["choices"] == [] and counts["usage"]["total_tokens"] == whole["usage"]["total_tokens"]
    assert not any("usage" in chunk for chunk in events(server))


def test_log_probabilities(server, qa):
    right = qa.encode(SAMPLES / "square.mp4").ask(COLOUR, logprobs=2)
    right.text  # noqa: B018 (generated)
    for entries in (
        answer(server, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"],
        [
            each
            for chunk in events(server, logprobs=True, top_logprobs=2)
            for each in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
        ],
    ):
        assert [each["token"] for each in entries] == [each["token"] for each in right.logprobs]
        assert [each["logprob"] for each in entries] == pytest.approx([each["logprob"] for each in right.logprobs])
        assert all(bytes(each["bytes"]).decode() == each["token"] for each in entries)
        assert [len(each["top_logprobs"]) for each in entries] == [2] * len(entries)


def test_an_answer_ends_at_a_stop_and_after_its_tokens(server):
    whole = text_of(answer(server))
    stopped = answer(server, stop=whole[2:4])
    assert text_of(stopped) == whole[:2] and stopped["choices"][0]["finish_reason"] == "stop"
    cut = answer(server, question="Describe it.", max_tokens=1)
    assert cut["usage"]["completion_tokens"] == 1


def test_an_answer_follows_a_schema(server):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object",
        "properties": {"x": {"type": "boolean"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    reply = answer(server, response_format=wanted, max_tokens=40)
    assert json.loads(text_of(reply))["x"] in (True, False)


def test_few_schemas_are_checked_at_once_and_each_once(qa, tmp_path, monkeypatch):
    """The requests of a client wait for each other in the queue, and other clients do not wait for them."""
    from evoprune.language import guidance

    running, most = [], []
    checked = SimpleQueue()
    going = threading.Event()

    def check(work, request, *limits):
        running.append(request)
        most.append(len(running))
        checked.put(request)
        going.wait(20)
        running.remove(request)
        raise ValueError("it does not finish")

    def ask(name: str, address: str) -> None:
        schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": name}}}
        with httpx.Client(transport=httpx.HTTPTransport(local_address=address), timeout=60) as client:
            answers.put(client.post(f"{server.url}{CHAT}", json=body(response_format=schema, max_tokens=9)))

    monkeypatch.setattr(guidance, "run_isolated", check)
    answers = SimpleQueue()
    with serving(qa, tmp_path, most=4) as server, ExitStack() as stack:
        stack.callback(going.set)

        def start(name: str, address: str) -> None:
            asking = threading.Thread(target=ask, args=(name, address))
            asking.start()
            stack.callback(asking.join)

        for name in ("a", "b", "c"):
            start(name, "127.0.0.2")
        wait(lambda: server.state.work.waiting == 3)
        start("d", "127.0.0.3")
        assert {"const" in checked.get(timeout=20) for _ in range(2)} == {True}
        wait(lambda: server.state.work.waiting == 4)
        start("e", "127.0.0.2")
        assert answers.get(timeout=20).status_code == 429  # the queue is full
        assert server.client.get("/health").status_code == 200
        going.set()
        for _ in range(4):
            answer = answers.get(timeout=20)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format"
            assert "the response_format cannot be used: it does not finish" in answer.json()["error"]["message"]
        wait(lambda: server.state.work.waiting == 0)
    assert max(most) == 2 and len(most) == 4


def test_a_schema_is_not_checked_for_a_client_that_has_gone(qa, tmp_path, monkeypatch):
    from evoprune.language import guidance

    checked = SimpleQueue()
    going = threading.Event()

    def check(work, request, *limits):
        checked.put(request)
        going.wait(20)
        return "", None

    monkeypatch.setattr(guidance, "run_isolated", check)
    with serving(qa, tmp_path) as server:
        for name in ("first", "second"):
            schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"const": name}}}
            data = json.dumps(body(response_format=schema)).encode()
            with connected(server) as connection:
                connection.sendall(json_head(len(data)) + data)
                wait(lambda: server.state.work.waiting == 1)
                if name == "first":
                    assert name in checked.get(timeout=20)
            wait(lambda: server.state.work.waiting == 0)
        going.set()
    assert checked.empty()


def test_several_models_answer_by_their_names(qa, tmp_path):
    other = VideoQA.load("demo-scenes")
    clip = "scenes/crossing.mp4"
    with serving(qa, tmp_path, {"scenes": other}) as server:
        listed = server.client.get("/v1/models").json()["data"]
        assert [each["id"] for each in listed] == ["demo", "scenes"]
        assert server.client.get("/v1/models/scenes").json()["id"] == "scenes"
        for name, model, kept in (
            ("demo", qa, False),
            ("scenes", other, False),
            ("demo", qa, True),
            ("scenes", other, True),
        ):
            right = model.encode(SAMPLES / clip).ask(COLOUR)
            reply = server.client.post(CHAT, json=body(name=clip, model=name)).json()
            assert (reply["model"], reply["choices"][0]["message"]["content"]) == (name, right.text)
            assert reply["usage"]["prompt_tokens"] == right.report.tokens.prompt
            assert reply["usage"]["evoprune"]["encoding_kept"] is kept
        unnamed = body(name=clip)
        del unnamed["model"]
        assert server.client.post(CHAT, json=unnamed).json()["model"] == "demo"
        response = server.client.post(CHAT, json=body(model="gpt-4"))
        assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
        assert '"demo", "scenes"' in response.json()["error"]["message"]


def test_each_model_has_its_own_number_of_threads(tmp_path, monkeypatch):
    from evoprune_serve import work

    before = torch.get_num_threads()
    one = VideoQA.load("demo", threads=1)
    two = VideoQA.load("demo", threads=2)
    torch.set_num_threads(before)
    seen = []
    begun = work.begun

    def watched(encoded, question, on_thoughts):
        seen.append((question.model, torch.get_num_threads()))
        return begun(encoded, question, on_thoughts)

    monkeypatch.setattr(work, "begun", watched)
    with serving(one, tmp_path, {"other": two}) as server:
        for name in ("demo", "other", "demo"):
            assert server.client.post(CHAT, json=body(model=name)).status_code == 200
    assert seen == [("demo", 1), ("other", 2), ("demo", 1)]


def test_a_conversation_is_that_of_video_qa(server, qa):
    chat = qa.encode(SAMPLES / "square.mp4").chat()
    messages = body("What happens to the square?")["messages"]
    for question in (None, COLOUR, "Which way does it move?"):
        if question:
            messages.append({"role": "user", "content": question})
        right = chat.ask(question or "What happens to the square?")
        reply = server.client.post(CHAT, json={"model": "demo", "messages": messages}).json()
        assert text_of(reply) == right.text
        messages.append(reply["choices"][0]["message"])
    assert reply["usage"]["evoprune"]["encoding_kept"] is True


@pytest.fixture
def counted(monkeypatch):
    """Counts how often an input was read and encoded."""
    counts = {"read": 0, "encoded": 0}
    read, encode = encoding.read_chunks, OpenInputs.encode

    def reading(*given, **options):
        counts["read"] += 1
        return read(*given, **options)

    def encoding_it(*given, **options):
        counts["encoded"] += 1
        return encode(*given, **options)

    monkeypatch.setattr(encoding, "read_chunks", reading)
    monkeypatch.setattr(OpenInputs, "encode", encoding_it)
    return counts


def test_a_second_question_about_a_video_reads_and_encodes_nothing(server, counted):
    first = answer(server)
    assert counted == {"read": 1, "encoded": 1} and first["usage"]["evoprune"]["encoding_kept"] is False
    second = answer(server, question="What happens to the square?")
    uploaded = upload(server)
    third = {"type": "file", "file": {"file_id": uploaded["id"]}}
    reply = server.client.post(CHAT, json={"messages": [message(COLOUR, third)]}).json()
    assert text_of(reply) == text_of(first)
    assert counted == {"read": 1, "encoded": 1} and second["usage"]["evoprune"]["time_ms"]["encode"] == 0
    answer(server, budget=0.5)  # the patches are in the store
    assert counted == {"read": 1, "encoded": 2}
    answer(server, frames=4)
    assert counted == {"read": 2, "encoded": 3}
    path = server.client.post(CHAT, json={"messages": [message(COLOUR, video(file_url()))]}).json()
    assert text_of(path) == text_of(first) and counted == {"read": 3, "encoded": 4}


# Sources.


def upload(server, name: str = "square.mp4", **form) -> dict:
    with open(SAMPLES / name, "rb") as file:
        response = server.client.post("/v1/files", files={"file": file}, data={"purpose": "vision"} | form)
    assert response.status_code == 200, response.text
    return response.json()


def test_files_are_uploaded_asked_about_and_deleted(server):
    made = upload(server)
    assert (made["object"], made["filename"], made["purpose"]) == ("file", "square.mp4", "vision")
    assert made["bytes"] == (SAMPLES / "square.mp4").stat().st_size and made["expires_at"] > made["created_at"]
    path = f"/v1/files/{made['id']}"
    assert server.client.get(path).json() == made
    part = {"type": "input_video", "file_id": made["id"]}
    ask = {"messages": [message(COLOUR, part)]}
    assert text_of(server.client.post(CHAT, json=ask).json()) == "green"
    assert server.client.delete(path).json() == {"id": made["id"], "object": "file", "deleted": True}
    for response in (server.client.get(path), server.client.delete(path), server.client.post(CHAT, json=ask)):
        assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"#EXTM3U\n/etc/passwd\n", bytes(2**20), b"%PDF-1.7\n" + bytes(99)])
def test_uploads_that_are_no_videos_are_400_and_leave_nothing(qa, tmp_path, content):
    with serving(qa, tmp_path) as server:
        for _ in range(2):
            response = server.client.post("/v1/files", files={"file": ("notes.txt", content)})
            problem = response.json()["error"]
            assert (response.status_code, problem["code"], problem["param"]) == (400, "invalid_video", "file")
            assert problem["message"].startswith("notes.txt is not a video") and str(tmp_path) not in problem["message"]
        assert not list(tmp_path.iterdir()) and not server.state.store._bytes
        uploads = server.state.uploads
        assert not (uploads._uploads or uploads._files or uploads._bytes)
        assert upload(server)["status"] == "processed"


def test_old_uploads_leave_the_disk_while_nobody_asks(qa, tmp_path, monkeypatch):
    from evoprune_serve import app, uploads

    monkeypatch.setattr(app, "AGEING_S", 0.05)
    with serving(qa, tmp_path, file_age_s=3600.0) as server:
        before = set(tmp_path.iterdir())
        made = server.client.post("/v1/files", files={"file": picture()}).json()
        assert made["expires_at"] - made["created_at"] == 3600
        assert set(tmp_path.iterdir()) - before
        monkeypatch.setattr(uploads, "time", SimpleNamespace(time=lambda: made["expires_at"] - 1))
        server.state.uploads.drop_old()
        assert set(tmp_path.iterdir()) - before
        monkeypatch.setattr(uploads, "time", SimpleNamespace(time=lambda: made["expires_at"]))
        wait(lambda: not set(tmp_path.iterdir()) - before)


def test_what_a_request_held_leaves_the_disk_while_nobody_asks(qa, tmp_path, monkeypatch):
    from evoprune_serve import app, store

    monkeypatch.setattr(app, "AGEING_S", 0.05)
    with serving(qa, tmp_path) as server:
        answer(server)
        assert list(tmp_path.iterdir())
        monkeypatch.setattr(store, "UNUSED_S", 0.0)
        wait(lambda: not list(tmp_path.iterdir()))


def test_uploads_take_room_while_they_come(qa, tmp_path):
    """The space is free again when the clients disconnect, and a stored file needs no additional space."""
    size = 2**20
    head = f"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: {2 * size}\r\n"
    head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    head += '--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    with serving(qa, tmp_path, files_bytes=3 * size + 2**16) as server:
        store = server.state.store
        with ExitStack() as stack:
            for number in (2, 3, 4):
                connection = stack.enter_context(connected(server, f"127.0.0.{number}"))
                connection.sendall(head.encode() + bytes(size))
            wait(lambda: store._bytes > 3 * size)
            refused = server.client.post("/v1/files", files={"file": picture(size)})
            assert refused.status_code == 507 and refused.json()["error"]["code"] == "storage_full"
            assert error(server, 507)["code"] == "storage_full"
        wait(lambda: not store._bytes)
        made = server.client.post("/v1/files", files={"file": picture(size)})
        assert made.status_code == 200 and store._bytes == size


def test_one_client_leaves_room_for_the_uploads_of_others(qa, tmp_path, monkeypatch):
    """A client's share is free again after its files are deleted, and refused uploads don't use it up."""
    from evoprune_serve import uploads

    monkeypatch.setattr(uploads, "MOST_OF_CLIENT", 3)
    size = 2**20

    def posted(content: bytes, address: str = "127.0.0.1") -> httpx.Response:
        with httpx.Client(transport=httpx.HTTPTransport(local_address=address)) as client:
            return client.post(f"{server.url}/v1/files", files={"file": content})

    with serving(qa, tmp_path, files_bytes=4 * size) as server:
        kept = [posted(picture()).json()["id"] for _ in range(3)]
        refused = posted(picture())
        assert refused.status_code == 413 and "already: delete some" in refused.json()["error"]["message"]
        assert posted(picture(), "127.0.0.2").status_code == 200
        server.client.delete(f"/v1/files/{kept.pop()}")
        for _ in range(4):
            refused = posted(picture(2 * size))
            assert refused.status_code == 413 and refused.json()["error"]["code"] == "storage_full"
        assert posted(picture()).status_code == 200
        assert posted(picture(size), "127.0.0.2").status_code == 200


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("count", [0, 3 * 2**20])
def test_an_upload_to_a_full_disk_is_507_and_leaves_nothing(qa, tmp_path, monkeypatch, count):
    """A small file is written when it is closed, a large one as it arrives."""
    from evoprune_serve import store

    create = tempfile.NamedTemporaryFile

    def on_full_disk(*given, **options):
        file = create(*given, **options)
        with open("/dev/full", "wb") as full:
            os.dup2(full.fileno(), file.fileno())
        return file

    with serving(qa, tmp_path) as server:
        monkeypatch.setattr(store.tempfile, "NamedTemporaryFile", on_full_disk)
        failed = server.client.post("/v1/files", files={"file": picture(count)})
        assert failed.status_code == 507 and failed.json()["error"]["message"] == "the server's disk is full"
        assert error(server, 507)["message"] == "the server's disk is full"  # the video in a request
        assert not list(tmp_path.iterdir())
        monkeypatch.undo()
        assert server.client.post("/v1/files", files={"file": picture(count)}).status_code == 200


PART = 'Content-Disposition: form-data; name="file"; filename="a"\r\n'


def form(*parts: str, boundary: str = "b", end: str = "--b--\r\n") -> bytes:
    return ("".join(f"--{boundary}\r\n{part}\r\n" for part in parts) + end).encode("latin-1")


def text_part(name: str, text: str = "x", more: str = "") -> str:
    return f'Content-Disposition: form-data; name="{name}"\r\n{more}\r\n{text}'


def test_forms_that_are_not_valid_are_400(server, tmp_path):
    file = f"{PART}\r\nx"
    idna = "Content-Type: text/plain; charset=idna\r\n"
    for kind, content, says in (
        *(
            (f"boundary=b; charset={name}", form(file), "character set")
            for name in ("idna", "undefined", "utf-7", "hex")
        ),
        ("boundary=b", form(file, text_part("purpose", "vision", idna)), "character set"),
        ("boundary=" + "b" * 300, form(file), "not valid"),
        ("boundary=", form(file), "no boundary"),
        ("a=b", form(file), "no boundary"),
        ("boundary=c", form(file), "not valid"),
        ("boundary=b", form(file, end=""), "breaks off"),
        ("boundary=b", form("\r\nx"), "Content-Disposition"),
        ("boundary=b", form('Content-Disposition: attachment; name="file"\r\n\r\nx'), "Content-Disposition"),
        ("boundary=b", form("Content-Disposition: form-data\r\n\r\nx"), "Content-Disposition"),
        ("boundary=b", form("Content-Disposition\r\n\r\nx"), "not valid"),
        ("boundary=b", form(file, file), "more than one file"),
        (
            "boundary=b",
            form('Content-Disposition: form-data; name="foo"; filename="a.mp4"\r\n\r\nx'),
            "in the field file",
        ),
        ("boundary=b", form(text_part("a"), text_part("a")), "twice"),
        ("boundary=b", form(text_part("purpos"), file), "purpos is not supported here; did you mean purpose?"),
        (
            "boundary=b",
            form(text_part("expires"), file),
            "expires is not supported here; the fields are file and purpose",
        ),
        ("boundary=b", form(text_part("purpose", "visoin"), file), "did you mean vision?"),
        ("boundary=b", form(*map(text_part, "abcdefghi")), "more than 8 fields"),
        ("boundary=b", form(text_part("purpose", 2000 * "x")), "more than 1024 bytes"),
        ("boundary=b", form(f"{PART}A: {5000 * 'a'}\r\n\r\nx"), "not valid"),
        ("boundary=b", form(PART + 9 * "A: b\r\n" + "\r\nx"), "not valid"),
    ):
        head = {"Content-Type": f"multipart/form-data; {kind}"}
        response = server.client.post("/v1/files", content=content, headers=head)
        assert response.status_code == 400 and says in response.json()["error"]["message"], (kind, content)
    assert not list(tmp_path.iterdir())


def test_a_misspelled_field_and_no_messages(server):
    from evoprune_serve.errors import ApiError
    from evoprune_serve.fields import Fields

    response = server.client.post(CHAT, json={"messages": []})
    assert response.json()["error"]["message"] == "messages is empty"
    fields = Fields({"budgt": 0.1})
    fields.take("budget", float)
    with pytest.raises(ApiError, match="budgt is not supported here; did you mean budget"):
        fields.end()
    for wrong, right in (("max_token", "max_tokens"), ("respons_format", "response_format")):
        message = server.client.post(CHAT, json=body() | {wrong: 1}).json()["error"]["message"]
        assert message == f"{wrong} is not supported here; did you mean {right}?"


def test_names_of_uploads(server):
    kind = {"Content-Type": "multipart/form-data; boundary=b; charset=UTF-8"}
    for disposition, name in (
        ('name="file"; filename="a b.mp4"', "a b.mp4"),
        ("name=file; filename=a.mp4", "a.mp4"),
        ("name=\"file\"; filename*=UTF-8''na%C3%AFve.mp4", "naïve.mp4"),
        ('name="file"; filename="b"; filename*=utf-8\'en\'%F0%9F%98%80', "😀"),
        ("name=\"file\"; filename*=idna''%ff", "file"),
        ('name="file"; filename="\xff\xfe"', "��"),
        ('name="file"', "file"),
    ):
        head = f"Content-Disposition: form-data; {disposition}\r\nContent-Type: video/mp4; charset=binary\r\n\r\n"
        response = server.client.post("/v1/files", content=form(head + picture().decode("latin-1")), headers=kind)
        assert response.json()["filename"] == name


def test_a_list_of_frames_is_the_video(server, qa, tmp_path):
    """With a frame rate or with times, the answer is the same as that of `VideoQA` with the array of frames."""
    frames = np.zeros((6, 56, 84, 3), np.uint8)
    frames[:, 14:42, 14:42] = (0, 200, 0)
    pictures = []
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
        with open(tmp_path / f"{number}.png", "rb") as file:
            pictures.append(server.client.post("/v1/files", files={"file": file}).json()["id"])
    shown = [{"file_id": each} for each in pictures]
    for how, same in (
        ({"fps": 2}, {"frame_rate": 2.0}),
        ({"times_s": [0, 1, 2, 4, 5, 6]}, {"times_s": [0, 1, 2, 4, 5, 6]}),
    ):
        right = qa.encode(frames, **same).ask(COLOUR)
        part = {"type": "video", "video": shown} | how
        reply = server.client.post(CHAT, json={"messages": [message(COLOUR, part)]}).json()
        assert text_of(reply) == right.text
        assert reply["usage"]["evoprune"]["frames"] == [right.report.sampling.frames]
    wrong = {"type": "video", "video": [shown[0], file_url()], "fps": 2}
    response = server.client.post(CHAT, json={"messages": [message(COLOUR, wrong)]})
    assert "is not an image" in response.json()["error"]["message"]


def test_frames_that_take_too_much_memory_are_413(server, monkeypatch):
    from evoprune_serve import sources

    content = io.BytesIO()
    Image.new("RGB", (84, 56), (0, 200, 0)).save(content, "PNG")
    shown = "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()
    ask = {"messages": [message(COLOUR, {"type": "video", "video": [shown] * 2, "fps": 1})]}
    assert server.client.post(CHAT, json=ask).status_code == 200
    monkeypatch.setattr(sources, "Host", lambda: SimpleNamespace(available_memory=lambda: 1000))
    response = server.client.post(CHAT, json=ask | {"budget": 0.5})
    assert response.status_code == 413 and response.json()["error"]["code"] == "out_of_memory"
    assert "fewer or smaller frames" in response.json()["error"]["message"]


def test_several_inputs_are_asked_about_together(server, qa):
    right = qa.ask([SAMPLES / "square.mp4", SAMPLES / "three.mp4"], COLOUR)
    shown = video(url_of("square.mp4")), video(url_of("three.mp4"))
    reply = server.client.post(CHAT, json={"messages": [message(COLOUR, *shown)]}).json()
    assert text_of(reply) == right.text and len(reply["usage"]["evoprune"]["frames"]) == 2


def test_inputs_between_texts_are_read_in_their_places(server, qa):
    from evoprune.language import Placed

    names = ["square.mp4", "three.mp4"]
    question = Placed(["Video 1:", None, "Video 2:", None, COLOUR])
    right = qa.encode([SAMPLES / name for name in names]).ask(question)
    one, two = (video(url_of(name)) for name in names)
    texts = [{"type": "text", "text": text} for text in ("Video 1:", "Video 2:", COLOUR)]
    reply = answer(server, messages=[{"role": "user", "content": [texts[0], one, texts[1], two, texts[2]]}])
    assert text_of(reply) == right.text
    assert reply["usage"]["prompt_tokens"] == right.report.tokens.prompt


# Refused requests.


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[1]", "not an object"),
        (b"{}", "messages is missing"),
    ],
)
def test_bodies_that_are_no_request(server, content, says):
    response = server.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400 and says in response.json()["error"]["message"]
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_of_many_values_is_refused(server):
    """Parsed, it would take a hundred times its size."""
    for path in (CHAT, "/v1/responses", "/page/units"):
        for value in (b"1", b"[]", b"{}", b"[" * 90 + b"]" * 90, b'{"a":' * 90 + b"0" + b"}" * 90):
            count = 200_000 // max(1, value.count(b"[") + value.count(b"{"))
            content = b'{"messages": [' + b",".join([value] * count) + b"]}"
            response = server.client.post(path, content=content, headers={"Content-Type": "application/json"})
            assert response.status_code == 400
            assert "more than 131,072 commas" in response.json()["error"]["message"]


def test_a_body_with_a_large_video_has_few_values(server):
    content = [video(f"data:video/mp4;base64,{'AAAA' * 2**21}"), video(url_of("square.mp4"))]
    response = server.client.post(CHAT, json={"messages": [message(COLOUR, *content)]})
    assert response.json()["error"]["code"] == "invalid_video"


def test_bodies_reserve_memory_for_their_values(qa, tmp_path):
    """A small body may take much more memory once it is parsed."""
    small = access(bodies_bytes=2**20)
    with serving(qa, tmp_path, access=small) as server:
        values = json.dumps({"messages": [0] * 5000}).encode()
        head = {"Content-Type": "application/json"}
        assert server.client.post(CHAT, content=values, headers=head).status_code == 429
        text = json.dumps({"messages": "0" * 5000}).encode()
        assert server.client.post(CHAT, content=text, headers=head).status_code == 400


def json_head(size: int, more: str = "") -> bytes:
    """Return the HTTP head of a question of `size` bytes."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{more}"
    return f"{head}Content-Length: {size}\r\n\r\n".encode()


def chunked(data: bytes, size: int) -> bytes:
    pieces = [data[start : start + size] for start in range(0, len(data), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


CHUNKED_HEAD = json_head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")


def test_chunked_bodies_are_read(server):
    for size in (100, 1000, 2**16):
        with connected(server) as connection:
            connection.sendall(CHUNKED_HEAD + chunked(json.dumps(body()).encode() + b" " * 150_000, size))
            assert b'"green"' in received(connection, b"}}")


def test_requests_that_take_much_work_for_their_size_are_refused(server):
    for sent in (
        CHUNKED_HEAD + chunked(b"[" * 200_000, 1),
        CHUNKED_HEAD + chunked(b"[" * 200_000, 10),
        CHUNKED_HEAD + b"1\r\n[\r\n0\r\n" + b"a: b\r\n" * 20_000,
        HEALTH[:-2] + b"a: b\r\n" * 20_000 + b"\r\n",
        HEALTH[:-2] + b"a: " + b"b" * 100_000,
        HEALTH + HEALTH[:-2] + b"a: b\r\n" * 20_000 + b"\r\n",
    ):
        with connected(server) as connection:
            with suppress(OSError):  # the server closes the connection before the end
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
            answered = b""
            with suppress(ConnectionError):
                while piece := connection.recv(2**16):
                    answered += piece
        assert b"HTTP/1.1 400 " in answered or not answered, sent[:300]
        assert not any("Traceback" in line for line in server.lines)
        assert server.client.get("/health").status_code == 200


def test_errors_have_the_form_of_openai_and_no_path(server, tmp_path):
    broken = "data:video/mp4;base64," + "AAAA" * 50
    for problem in (
        error(server, 400, frobnicate=1),
        error(server, 404, model="other"),
        error(server, 400, budget="no"),
        server.client.post(CHAT, json={"messages": [message("?", video(broken))]}).json()["error"],
        server.client.post(CHAT, json={"messages": [message("?", video("file:///etc/passwd"))]}).json()["error"],
        server.client.get("/nothing").json()["error"],
        server.client.get(CHAT).json()["error"],
    ):
        assert {*problem} == {"message", "type", "param", "code"} and problem["code"]
        assert str(tmp_path) not in problem["message"] and str(SAMPLES) not in problem["message"]
    assert error(server, 400, question="word " * 9000)["code"] == "context_length_exceeded"
    assert server.client.get(CHAT).status_code == 405
    assert server.client.post(CHAT, content=b"{}").status_code == 415


ODD = [
    {"seed": -1}, {"seed": 2**63}, {"seed": 2**70}, {"max_tokens": 10**12}, {"temperature": 1e308}, {"top_p": 1e-300},
    {"fps": 1e-300}, {"fps": 1e300}, {"frames": 10**9}, {"frames": 10**30}, {"start": 1e308}, {"end": -1e308}, {"start": "9" * 400},
    {"budget": 1e-320}, {"budget": 1e-9}, {"budget": ""}, {"method": ""}, {"method": "+"}, {"method": "evoprune:alpha=1e999"},
    {"stop": ""}, {"stop": ["\ud800"]}, {"\ud800": 1}, {"model": "\ud800"}, {"question": "\ud800"}, {"question": "a\0b"},
    {"repetition_penalty": 1e-300}, {"top_k": 10**30}, {"think": "on"}, {"logprobs": True, "top_logprobs": -1},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(ODD)))
def test_odd_values_are_answered_or_the_client_s_error(server, number):
    data = json.dumps(body(**ODD[number]))
    response = server.client.post(CHAT, content=data, headers={"Content-Type": "application/json"})
    assert response.status_code in (200, 400, 404), (ODD[number], response.text)
    assert response.json()


def test_pictures_that_unpack_to_gigabytes_are_refused(server, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "bomb.png")
    data = (tmp_path / "bomb.png").read_bytes()
    uploaded = server.client.post("/v1/files", files={"file": data})
    part = {"type": "input_image", "image_url": "data:image/png;base64," + base64.b64encode(data).decode()}
    sent = server.client.post(CHAT, json={"messages": [message("?", part)]})
    for response in (uploaded, sent):
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_video"


def test_the_files_of_a_gguf_model_are_listed(qa, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    text = Folder(save_tiny(tmp_path / "original")).write_pair(tmp_path / "models", kind="Q8_0")
    names = [text.name, "mmproj-tiny-f16.gguf"]
    with serving(qa, tmp_path, {text.name: VideoQA.load(str(text))}) as server:
        demo, model = server.client.get("/v1/models").json()["data"]
        assert (demo.get("files"), model["files"]) == (None, names)
        assert [each["files"] for each in server.client.get("/page/settings").json()["models"]] == [[], names]
        reply = server.client.post(CHAT, json=body(model=text.name, max_tokens=2)).json()
        assert (reply["model"], reply["usage"]["completion_tokens"]) == (text.name, 2)


def test_models_health_and_metrics(server):
    answer(server)
    (model,) = server.client.get("/v1/models").json()["data"]
    assert model["id"] == "demo" and server.client.get("/v1/models/demo").json() == model
    assert server.client.get("/v1/models/other").json()["error"]["code"] == "model_not_found"
    assert server.client.get("/health").text == '{"status":"ok"}'
    for wrong, right in (
        ("/v1/model", "/v1/models"),
        ("/v1/chat/completion", "/v1/chat/completions"),
        ("/heath", "/health"),
    ):
        missing = server.client.get(wrong)
        message = missing.json()["error"]["message"]
        assert missing.status_code == 404 and message.startswith(f"there is no {wrong}; did you mean {right}? ")
    response = server.client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    counts = dict(line.rsplit(" ", 1) for line in response.text.splitlines() if not line.startswith("#"))
    for path, status, count in (("/health", 200, 1), ("/v1/models", 200, 2), ("/v1/models", 404, 1)):
        assert counts[f'evoprune_requests_total{{path="{path}",status="{status}"}}'] == f"{count}.0"
    assert counts['evoprune_requests_total{path="/v1/chat/completions",status="200"}'] == "1.0"
    assert float(counts['evoprune_visual_tokens_total{kind="kept",model="demo"}']) > 0
    assert counts["evoprune_waiting"] == "0.0"


def test_logs_have_contents_only_where_they_are_wanted(qa, tmp_path):
    for wanted in (False, True):
        with serving(qa, tmp_path, log_contents=wanted) as server:
            answer(server)
            error(server, 400, frobnicate=1)
            assert len(server.lines) == 2 and server.lines[1].endswith(f"POST {CHAT} 400 unsupported_parameter")
            assert any(COLOUR in line for line in server.lines) is wanted
            assert not any("frobnicate" in line for line in server.lines)


# Access.


def access(**given):
    from evoprune_serve.guard import Access

    return Access(**given)


def test_a_key_is_asked_for(qa, tmp_path):
    with serving(qa, tmp_path, access=access(key="secret")) as server:
        for headers in (
            {},
            {"Authorization": "Bearer other"},
            {"Authorization": "secret"},
            {"Authorization": "Bearer é"},
        ):
            encoded = {name: value.encode() for name, value in headers.items()}
            response = server.client.get("/v1/models", headers=encoded)
            assert response.status_code == 401 and response.json()["error"]["code"] == "invalid_api_key"
        assert server.client.get("/health").status_code == 200
        assert server.client.get("/metrics").status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert server.client.get("/v1/models", headers=right).status_code == 200
        assert server.client.post(CHAT, json=body(), headers=right).status_code == 200


def test_another_method_is_told_those_that_are_allowed(server):
    for method, path, allowed, instead in (
        ("PUT", "/v1/models", {"GET", "HEAD"}, "send GET to /v1/models, not PUT; "),
        ("GET", CHAT, {"POST"}, f"send POST to {CHAT}, not GET; "),
        ("GET", "/v1/responses", {"POST"}, "send POST to /v1/responses, not GET; "),
        ("POST", "/v1/files/file-1", {"GET", "HEAD", "DELETE"}, "send DELETE or GET to /v1/files/file-1, not POST; "),
    ):
        response = server.client.request(method, path)
        assert response.status_code == 405 and {*response.headers["allow"].split(", ")} == allowed
        error = response.json()["error"]
        assert error["message"].startswith(instead) and error["code"] == "method_not_allowed"


def test_bodies_are_sent_as_they_are(server):
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = server.client.post(CHAT, content=b"\x1f\x8b", headers=headers)
    assert response.status_code == 415 and "Content-Encoding" in response.json()["error"]["message"]


def test_other_hosts_and_origins_are_refused(qa, tmp_path):
    """A page of another site cannot send requests, neither directly nor through a DNS name of its own for this machine."""
    with serving(qa, tmp_path, access=access(origins=["https://app.example"])) as server:
        get = server.client.get
        assert get("/v1/models", headers={"Host": "evil.example"}).json()["error"]["code"] == "wrong_host"
        assert get("/v1/models", headers={"Host": "LOCALHOST:1"}).status_code == 200
        assert get("/v1/models", headers={"Origin": "https://evil.example"}).json()["error"]["code"] == "wrong_origin"
        assert get("/v1/models", headers={"Origin": server.url}).status_code == 200
        allowed = get("/v1/models", headers={"Origin": "https://app.example"})
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        # Headers of OpenAI's package for browsers.
        own = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
        asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": own}
        preflight = server.client.options(CHAT, headers=asked | {"Origin": "https://app.example"})
        assert preflight.status_code == 200 and preflight.headers["access-control-allow-headers"] == own
        asked["Origin"] = "https://evil.example"
        assert "access-control-allow-origin" not in server.client.options(CHAT, headers=asked).headers


def test_bodies_have_limits(qa, tmp_path):
    with serving(qa, tmp_path, access=access(body_bytes=2**20, bodies_bytes=2**19, upload_bytes=2**20)) as server:
        for path, size, status in ((CHAT, 2**21, 413), (CHAT, 2**19 + 1, 429), ("/v1/files", 2**22, 413)):
            json_type = {"Content-Type": "application/json"}
            response = server.client.post(path, content=b" " * size, headers=json_type)
            assert response.status_code == status, (path, size)
            assert server.client.post(path, content=iter([b" "] * 5), headers=json_type).status_code in (400, 415)

        def endless():
            while True:
                yield b" " * 2**16

        response = server.client.post(CHAT, content=endless(), headers={"Content-Type": "application/json"})
        assert response.status_code in (413, 429)
        for path in (CHAT, "/v1/files"):
            announced = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**13}\r\n\r\n"
            assert raw(server, announced).startswith(b"HTTP/1.1 413")
        assert server.state.bodies._bytes == 0


@pytest.mark.parametrize(
    "content", [b'{"messages": 1%b}' % (b"1" * 2**23), b'{"messages": "%b' % (b"a" * 2**23), b"a" * 2**23 + b"\xff"]
)
def test_refused_bodies_leave_the_memory_at_once(server, content):
    server.client.get("/health")
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        response = server.client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["code"] == "invalid_json"
        wait(lambda: tracemalloc.get_traced_memory()[0] < 2**22)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_long_data_with_a_wide_character_is_refused_before_it_is_copied(server):
    """The character makes Python store the whole string with four bytes a character."""
    long = "data:;base64," + "A" * (2**20 + 1) + "\U0001f600"
    reply = server.client.post(CHAT, json={"messages": [message(COLOUR, video(long))]})
    assert reply.status_code == 400 and reply.json()["error"]["code"] == "invalid_json"
    assert "other than ASCII" in reply.json()["error"]["message"]


def test_a_long_body_may_have_wide_characters_in_its_question(server):
    data = "data:;base64," + base64.b64encode(bytes(2**20)).decode()
    reply = server.client.post(CHAT, json={"messages": [message("who \U0001f600?", video(data))]})
    assert reply.json()["error"]["code"] == "invalid_video"  # the body was read


def test_a_client_has_half_of_the_room_for_bodies(qa, tmp_path, monkeypatch):
    from evoprune_serve import app

    monkeypatch.setattr(app, "client_of", lambda request: request.headers.get("x-client", "another"))
    size = 2**19
    limits = access(body_bytes=size, bodies_bytes=4 * size)
    with serving(qa, tmp_path, access=limits) as server:
        with connected(server) as first, connected(server) as second, connected(server) as third:
            unfinished = json_head(size, "X-Client: greedy\r\n") + b" " * (size - 100)
            first.sendall(unfinished)
            second.sendall(unfinished)
            wait(lambda: server.state.bodies._bytes == 2 * (size - 100))
            third.sendall(unfinished)
            assert third.recv(4096).startswith(b"HTTP/1.1 429")
            assert server.client.post(CHAT, json=body() | {"user": "x" * (size // 2)}).status_code == 200
        wait(lambda: not server.state.bodies._bytes and not server.state.bodies._clients)


def test_a_body_that_almost_stops_is_408(server, monkeypatch):
    """This does not depend on how much arrived at once before. A body that keeps arriving fast enough may take a long time."""
    from evoprune_serve import guard

    monkeypatch.setattr(guard, "SLOW_S", 0.5)
    monkeypatch.setattr(guard, "SLOW_BYTES_S", 1000)
    with connected(server) as connection:
        connection.sendall(json_head(10**6) + b" " * (10**6 - 2000))
        connection.settimeout(0.1)
        found = b""
        end = time.monotonic() + 30
        while not found:
            assert time.monotonic() < end
            with suppress(ConnectionError):  # the answer may have arrived
                connection.sendall(b" ")
            with suppress(TimeoutError):
                found = connection.recv(4096)
        assert found.startswith(b"HTTP/1.1 408")
    # On this clock, each part of the body takes 10 s, and makes up for them.
    monkeypatch.setattr(guard, "SLOW_S", 30.0)
    monkeypatch.setattr(guard, "SLOW_BYTES_S", 40)
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=partial(next, itertools.count(0.0, 10.0))))
    with connected(server) as connection:
        connection.sendall(json_head(4000))
        for sent in range(400, 4000, 400):
            connection.sendall(b"?" * 400)
            wait(lambda sent=sent: server.state.bodies._bytes == sent)
        connection.sendall(b"?" * 400)
        assert b"invalid_json" in received(connection, b"}}")


def raw(server, text: str) -> bytes:
    """Return the beginning of the response to raw text."""
    with connected(server) as connection:
        connection.sendall(text.encode())
        return connection.recv(4096)


def connected(server, address: str = "127.0.0.1") -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), 60, (address, 0))


# How long a connection may stay open without a request.

HEAD_S = 0.3  # the time limit for heads in these tests
LONGER_S = (HEAD_S, 1.0, 3.0)
HEALTHY = b'{"status":"ok"}'


def limit_heads(monkeypatch: pytest.MonkeyPatch, limit_s: float) -> None:
    """Set the time limit for the head of a request. It holds for heads that begin later."""
    from evoprune_serve.connections import Connection

    monkeypatch.setattr(Connection, "head_s", limit_s)


def hold(monkeypatch: pytest.MonkeyPatch, talk: Callable[[float], None]) -> None:
    """Call a function that is given the time limit for heads, and whose connection the server must not close.

    A limit that is too short for a busy machine, which reads a head late, is replaced by a longer one.
    """
    for number, limit_s in enumerate(LONGER_S, 1):
        limit_heads(monkeypatch, limit_s)
        try:
            return talk(limit_s)
        except ConnectionError:
            if number == len(LONGER_S):
                raise


def ended_while_sending(connection: socket.socket) -> bool:
    """Send a head of 20 s, one byte at a time. Returns True if the server closes the connection meanwhile."""
    connection.settimeout(HEAD_S / 6)
    text = HEALTH[:-2] + b"X: " + b"x" * 360
    for number in range(len(text)):
        try:
            connection.sendall(text[number : number + 1])
            assert connection.recv(1) == b""
            return True
        except TimeoutError:  # still open, and no response
            continue
        except ConnectionError:
            return True
    return False


def received(connection: socket.socket, end: bytes, times: int = 1) -> bytes:
    """Return the response up to the n-th occurrence of `end`. Raises ConnectionError if the connection is closed before."""
    text = b""
    while text.count(end) < times:
        piece = connection.recv(4096)
        if not piece:
            raise ConnectionError(text)
        text += piece
    return text


def test_a_connection_without_a_request_is_closed(server, monkeypatch):
    with connected(server) as later:
        later.sendall(HEALTH)
        received(later, HEALTHY)
        limit_heads(monkeypatch, HEAD_S)
        assert ended_while_sending(later)
    with connected(server) as silent, connected(server) as slow_one:
        assert ended_while_sending(slow_one)
        assert silent.recv(1) == b""


def test_a_connection_is_kept_between_requests(server, monkeypatch):
    def talk(limit_s: float) -> None:
        with connected(server) as connection:
            connection.sendall(HEALTH[:10])
            time.sleep(limit_s / 2)
            connection.sendall(HEALTH[10:])
            received(connection, HEALTHY)
            time.sleep(1.2 * limit_s)
            connection.sendall(2 * HEALTH + HEALTH[:20])
            received(connection, HEALTHY, times=2)
            connection.sendall(HEALTH[20:])
            received(connection, HEALTHY)

    hold(monkeypatch, talk)


def test_an_idle_connection_stays_open_for_a_minute(server):
    """Clients such as http.client do not notice that a connection was closed until they use it."""
    with connected(server) as connection:
        connection.sendall(HEALTH)
        received(connection, HEALTHY)
        (known,) = (each for each in server.process.server_state.connections if each.client == connection.getsockname())
        wait(lambda: known.timeout_keep_alive_task)
        ends_s = known.timeout_keep_alive_task.when() - known.loop.time()
        assert 60 < ends_s < 70


def test_a_slow_body_has_its_own_limit(server, monkeypatch):
    def talk(limit_s: float) -> None:
        with connected(server) as connection:
            connection.sendall(json_head(6))
            for _ in range(6):
                time.sleep(limit_s / 3)
                connection.sendall(b"?")
            assert b"invalid_json" in received(connection, b"}}")

    hold(monkeypatch, talk)


def test_a_stream_may_last(server, slow, monkeypatch):
    data = json.dumps(body(stream=True)).encode()

    def talk(limit_s: float) -> None:
        slow.clear()
        with connected(server) as connection:
            connection.sendall(json_head(len(data)) + data)
            received(connection, b"data: ")
            time.sleep(2 * limit_s)
            slow.set()
            received(connection, b"data: [DONE]")

    hold(monkeypatch, talk)


@pytest.fixture
def crowded(server, monkeypatch):
    """A server with room for six connections, four of them per address."""
    from evoprune_serve.connections import Connection

    monkeypatch.setattr(Connection, "most", 6)
    monkeypatch.setattr(Connection, "share", 4)
    limit_heads(monkeypatch, 600.0)
    with ExitStack() as stack:

        def connect(address: str = "127.0.0.1", sent: bytes = b"") -> socket.socket:
            host, _, port = server.url.removeprefix("http://").partition(":")
            made = stack.enter_context(socket.create_connection((host, int(port)), 20, (address, 0)))
            made.sendall(sent)
            whole = sent.endswith(b"\r\n\r\n")

            def taken() -> bool:
                known = [
                    each for each in [*server.process.server_state.connections] if each.client == made.getsockname()
                ]
                return any(each.cycle or not whole for each in known)

            wait(taken)
            return made

        server.connect = connect
        yield server


def is_closed(connection: socket.socket) -> bool:
    """Wait until the server closes a connection. Returns False if it doesn't."""
    connection.settimeout(20)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def is_open(connection: socket.socket) -> bool:
    connection.settimeout(0.2)
    try:
        return connection.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionError:
        return False


def test_half_open_connections_of_one_address_shut_nobody_out(crowded):
    busy = crowded.connect(sent=json_head(6))
    silent = [crowded.connect(sent=HEALTH[:20]) for _ in range(9)]
    assert crowded.client.get("/health").status_code == 200
    assert all(map(is_closed, silent[:7]))
    assert all(map(is_open, silent[7:]))
    busy.sendall(b"??????")
    assert b"invalid_json" in received(busy, b"}}")


def test_the_address_with_the_most_connections_makes_room(crowded):
    many = [crowded.connect("127.0.0.2") for _ in range(4)]
    few = [crowded.connect("127.0.0.3") for _ in range(2)]
    last = crowded.connect("127.0.0.4", HEALTH)
    received(last, HEALTHY)
    assert is_closed(many[0])
    assert all(map(is_open, many[1:] + few))


def test_connections_with_requests_in_progress_are_kept(crowded):
    busy = [crowded.connect(sent=json_head(6)) for _ in range(4)]
    with connected(crowded) as refused:
        assert refused.recv(4096).startswith(b"HTTP/1.1 503 ")
    received(crowded.connect("127.0.0.2", HEALTH), HEALTHY)
    for each in busy:
        each.sendall(b"??????")
        assert b"invalid_json" in received(each, b"}}")


@pytest.mark.parametrize("origins", [(), ("https://app.example",)])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_body_of_two_lengths_is_refused(qa, tmp_path, method, origins):
    """The rest of the connection, which one parser takes for a request and another for a body, is not read."""
    hidden = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    origin = "Origin: https://app.example\r\nAccess-Control-Request-Method: GET\r\n" if origins else ""
    head = f"{method} {CHAT} HTTP/1.1\r\nHost: localhost\r\n{origin}Content-Type: application/json\r\n"
    with serving(qa, tmp_path, access=access(origins=origins)) as server, connected(server) as connection:
        connection.sendall(f"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".encode() + hidden)
        answered = b""
        while piece := connection.recv(4096):
            answered += piece
    assert answered.startswith(b"HTTP/1.1 400 ") and answered.count(b"HTTP/1.1") == 1
    assert b"either a Content-Length or a Transfer-Encoding" in answered


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="Linux has such a limit")
def test_a_client_that_takes_nothing_of_its_answer_is_let_go(monkeypatch):
    from evoprune_serve import command

    monkeypatch.setattr(command, "UNTAKEN_S", 1)
    with command._listening("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        connection, _ = listening.accept()
        connection.settimeout(20)
        with connection, pytest.raises(TimeoutError) as caught:
            while True:
                connection.sendall(bytes(2**20))
    assert caught.value.errno == errno.ETIMEDOUT  # not the 20 s


# Work.


def in_threads(server, count: int, address: str = "127.0.0.1", **given):
    """Send the same request `count` times at once. Returns the threads and a list of responses, which grows."""
    found = []

    def ask():
        import httpx

        transport = httpx.HTTPTransport(local_address=address)
        with httpx.Client(base_url=server.url, transport=transport, timeout=60) as client:
            found.append(client.post(CHAT, json=body(**given)))

    threads = [threading.Thread(target=ask) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads, found


def wait(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_behind_a_full_queue_is_429(qa, tmp_path, slow):
    with serving(qa, tmp_path, most=2) as server:
        threads, found = in_threads(server, 1)
        assert slow.begun.wait(30)
        more, _ = in_threads(server, 2)
        wait(lambda: server.state.work.waiting == 2)
        problem = server.client.post(CHAT, json=body())
        assert problem.status_code == 429 and 1 <= int(problem.headers["retry-after"]) <= 60
        assert problem.json()["error"]["code"] == "rate_limit_exceeded"
        slow.set()
        for thread in threads + more:
            thread.join()
        assert [text_of(each.json()) for each in found] == ["green"]
        assert answer(server)


def test_clients_are_told_that_the_server_ends(qa, tmp_path, slow, monkeypatch):
    """The client whose answer is running is told after a moment, as the last event of its stream; queued ones at once."""
    monkeypatch.setattr("evoprune_serve.ending.GRACE_S", 0.5)
    with serving(qa, tmp_path) as server:
        streamed, answers = in_threads(server, 1, stream=True)
        assert slow.begun.wait(30)
        waiting, others = in_threads(server, 2)
        wait(lambda: server.state.work.waiting == 2)
        server.process.should_exit = True
        for thread in waiting:
            thread.join()
        for response in others:
            assert response.status_code == 503 and response.headers["retry-after"]
            assert response.json()["error"]["code"] == "shutting_down"
        for thread in streamed:
            thread.join()
        *_, last = [line.removeprefix("data: ") for line in answers[0].text.splitlines() if line]
        assert json.loads(last)["error"]["code"] == "shutting_down"
    assert not any("Traceback" in line for line in server.lines)


def refuses(server) -> bool:
    """Return True if the server accepts no more connections."""
    try:
        socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))).close()
    except ConnectionRefusedError:
        return True
    return False


def test_an_answer_is_complete_though_the_server_ends(qa, tmp_path, slow):
    with serving(qa, tmp_path) as server:
        threads, found = in_threads(server, 1)
        assert slow.begun.wait(30)
        server.process.should_exit = True
        wait(lambda: refuses(server))
        slow.set()
        for thread in threads:
            thread.join()
        assert text_of(found[0].json()) == "green"


def test_weights_are_packed_while_nothing_is_asked(tmp_path, monkeypatch):
    from evoprune.backend.cpu import linear

    monkeypatch.setattr(linear, "SMALL_WEIGHT", 0)
    qa = VideoQA.load("demo")
    if not qa.loaded.packing.waiting:
        pytest.skip("no layer of this model waits on this CPU")
    with serving(qa, tmp_path) as server:
        end = time.monotonic() + 60
        while qa.loaded.packing.waiting:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert text_of(answer(server)) == "green"


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_is_given_up_when_its_client_goes(qa, tmp_path, slow, stream):
    data = json.dumps(body(name="three.mp4", stream=stream)).encode()
    with serving(qa, tmp_path) as server:
        with connected(server) as connection:
            connection.sendall(json_head(len(data)) + data)
            if stream:
                received(connection, b"data: ")
            assert slow.begun.wait(60) and server.state.work.busy
        wait(lambda: not server.state.work.busy and not server.state.work.waiting)
        wait(lambda: [line.split()[3] for line in server.lines] == ["499"])
        assert 'path="/v1/chat/completions",status="499"} 1.0' in server.client.get("/metrics").text
        slow.set()
        assert text_of(answer(server)) == "green"


def test_an_answer_that_takes_too_long_ends(qa, tmp_path, slow):
    with serving(qa, tmp_path, answer_s=1.0) as server:
        assert error(server, 504)["type"] == "server_error"
        with server.client.stream("POST", CHAT, json=body(stream=True)) as response:
            lines = [line for line in response.iter_lines() if line]
        assert "no answer in time" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        wait(lambda: not server.state.work.busy)


def test_inputs_are_read_while_another_question_is_answered(qa, tmp_path, slow, counted):
    with serving(qa, tmp_path) as server:
        threads, found = in_threads(server, 1)
        assert slow.begun.wait(30)
        more, later = in_threads(server, 1, name="three.mp4", question="How many shapes are there?")
        wait(lambda: counted["read"] == 2)
        assert counted["encoded"] == 1 and not later
        slow.set()
        for thread in threads + more:
            thread.join()
        assert [text_of(each.json()) for each in found + later] == ["green", "3"]


def test_without_memory_what_is_kept_goes_first(server, monkeypatch):
    answer(server)
    memory_fails(monkeypatch, times=1)
    assert answer(server, name="three.mp4", question="How many shapes are there?")
    assert len(server.state.work.kept) == 1
    memory_fails(monkeypatch, times=3)
    problem = error(server, 413, name="pan.mp4")
    assert problem["code"] == "out_of_memory"


def test_what_fails_inside_is_told_to_the_log_alone(server, monkeypatch):
    def fail(self, *given, **options):
        raise RuntimeError("secret /path")

    monkeypatch.setattr(OpenInputs, "encode", fail)
    problem = error(server, 500)
    assert problem["code"] == "internal_error" and "secret" not in problem["message"]
    assert any("secret /path" in line for line in server.lines)


def test_a_request_that_is_displaced_while_its_files_come_is_429(qa, tmp_path, monkeypatch):
    from evoprune_serve.work import Gone

    comes, goes_on = threading.Semaphore(0), threading.Event()
    with serving(qa, tmp_path, most=2) as server:
        fetch = server.state.sources.fetch

        def slow(sources, check):
            comes.release()
            while not goes_on.wait(0.01):
                try:
                    check()
                except Gone:
                    goes_on.set()
            return fetch(sources)

        monkeypatch.setattr(server.state.sources, "fetch", slow)
        threads, found = in_threads(server, 2)
        assert all(comes.acquire(timeout=60) for _ in threads)
        other, later = in_threads(server, 1, address="127.0.0.2")
        for thread in threads + other:
            thread.join()
        assert sorted(response.status_code for response in found) == [200, 429]
        (refused,) = (response for response in found if response.status_code == 429)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded" and later[0].status_code == 200
        wait(lambda: not any(content.users for content in server.state.store._contents.values()))


def test_downloads_of_requests_that_are_given_up_end(qa, tmp_path, monkeypatch):
    """This also works if the downloads occupy all download threads."""
    import httpx

    data = json.dumps(body()).encode()
    with serving(qa, tmp_path, most=2) as server:
        sources = server.state.sources
        fetch = sources.fetch
        downloads = threading.Semaphore(0)

        def endless(given, check):
            downloads.release()
            while True:
                check()
                time.sleep(0.01)

        monkeypatch.setattr(sources, "fetch", endless)
        with connected(server) as first, connected(server) as second:
            for connection in (first, second):
                connection.sendall(json_head(len(data)) + data)
                assert downloads.acquire(timeout=60)
        wait(lambda: not server.state.work.waiting)
        monkeypatch.setattr(sources, "fetch", fetch)
        response = httpx.post(server.url + CHAT, json=body(), timeout=60)
        assert text_of(response.json()) == "green"


def test_nothing_is_left_in_memory_or_on_the_disk(server, qa, tmp_path):
    """After many questions, including truncated, invalid and aborted ones, no threads, jobs or file references remain."""
    import httpx

    answer(server)
    before = threading.active_count()
    for number in range(12):
        with httpx.Client(base_url=server.url, timeout=0.01 if number % 3 == 0 else 30) as client:
            try:
                client.post(CHAT, json=body(budget=0.2 + number / 100, n=1 + (number % 3 == 1)))
            except httpx.TimeoutException:
                continue
    work = server.state.work
    wait(lambda: not work.busy and not work.waiting)
    wait(lambda: all(not content.users for content in server.state.store._contents.values()))
    assert len(list(tmp_path.iterdir())) == 1 and len(work.kept) <= 8
    assert threading.active_count() <= before + 40 and not math.isnan(work.retry_s())
