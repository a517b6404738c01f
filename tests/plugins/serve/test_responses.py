"""/v1/responses: the same answers as chat completions, whole and in events; unsupported fields are refused by name."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from evoprune.session import PipelineOptions, load_model
from evoprune.video_qa import VideoQA
from evoprune_serve.errors import ApiError
from tests.plugins.serve.serving import CHAT, COLOUR, REASON, SAMPLES, body, serving, url_of
from tests.thinking import Saying, thinking_tokenizer

pytest.importorskip("starlette", reason=REASON)
pytest.importorskip("httpx", reason=REASON)

RESPONSES = "/v1/responses"
VIDEO = {"type": "input_video", "video_url": url_of("square.mp4")}
USUAL = PipelineOptions.of(max_new_tokens=40, fps=1.0, budget=0.5)
LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def asked(question: str = COLOUR, **given) -> dict:
    content = [VIDEO, {"type": "input_text", "text": question}]
    return {"model": "demo", "input": [{"role": "user", "content": content}]} | given


def answer(server, **given) -> dict:
    response = server.client.post(RESPONSES, json=asked(**given))
    assert response.status_code == 200, response.text
    return response.json()


def events(server, **given) -> list[dict]:
    """Return the events of a stream, and check their numbers and names."""
    with server.client.stream("POST", RESPONSES, json=asked(stream=True, **given)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    names = [line.removeprefix("event: ") for line in lines[::2]]
    found = [json.loads(line.removeprefix("data: ")) for line in lines[1::2]]
    assert names == [each["type"] for each in found]
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def same(response: dict) -> dict:
    """Return a response without the fields that change each time."""
    response = json.loads(json.dumps(response))
    for name in ("id", "created_at", "completed_at"):
        response.pop(name, None)
    del response["usage"]["evoprune"]
    for item in response["output"]:
        del item["id"]
    return response


def test_answers_are_those_of_chat_completions(server):
    given = {"budget": 0.5, "frames": 8, "temperature": 0.7, "seed": 3}
    chat = server.client.post(CHAT, json=body(**given)).json()
    reply = answer(server, **given)
    (item,) = reply["output"]
    assert item["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert (item["type"], item["role"], item["status"]) == ("message", "assistant", "completed")
    assert reply["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert reply["usage"]["total_tokens"] == chat["usage"]["total_tokens"]
    kept = "visual_tokens_kept"
    assert reply["usage"]["evoprune"][kept] == chat["usage"]["evoprune"][kept]
    assert (reply["object"], reply["status"], reply["model"], reply["temperature"]) == (
        "response",
        "completed",
        "demo",
        0.7,
    )
    assert reply["store"] is False and reply["error"] is None


@pytest.mark.parametrize("given", [{}, {"max_output_tokens": 1}, LOGPROBS])
def test_a_stream_ends_with_the_whole_response(server, given):
    question = "What happens to the square?"
    whole = answer(server, question=question, **given)
    found = events(server, question=question, **given)
    kinds = [each["type"].removeprefix("response.") for each in found]
    pieces = kinds.count("output_text.delta")
    last = "incomplete" if given == {"max_output_tokens": 1} else "completed"
    assert kinds == [
        *("created", "in_progress", "output_item.added", "content_part.added"),
        *["output_text.delta"] * pieces,
        *("output_text.done", "content_part.done", "output_item.done", last),
    ]
    assert same(found[-1]["response"]) == same(whole)
    assert whole["status"] == last
    text = "".join(each["delta"] for each in found if each["type"].endswith("delta"))
    assert text == whole["output"][0]["content"][0]["text"]
    chances = [chance for each in found if each["type"].endswith("delta") for chance in each["logprobs"]]
    assert chances == whole["output"][0]["content"][0]["logprobs"]
    assert bool(chances) == ("include" in given)
    assert [each["output_index"] for each in found if "output_index" in each] == [0] * (len(found) - 3)


def test_thoughts_are_an_item_before_the_text(server):
    """The demo models do not think, so the test uses the pieces of a model that does."""
    from evoprune_serve.responses import ResponseReply
    from evoprune_serve.work import Done, Piece

    report = server.state.models["demo"].encode(SAMPLES / "square.mp4").ask(COLOUR).report
    report.thoughts = "I see green"
    report.answer = "green"
    report.finish_reason = "stop"
    done = Done(report, None, False, 3)
    streamed = ResponseReply("demo", {})
    data = streamed.begin()
    for text, thought in (("I see", True), (" green", True), ("gr", False), ("een", False)):
        data += streamed.piece(Piece(text, thought, None))
    data += streamed.end(done, 0.0)
    found = [json.loads(line[6:]) for line in data.decode().split("\n") if line.startswith("data: ")]
    whole = ResponseReply("demo", {}).whole(done, 0.0)
    assert same(found[-1]["response"]) == same(whole)
    thoughts, text = whole["output"]
    assert (thoughts["type"], thoughts["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "I see green"}])
    assert text["content"][0]["text"] == "green"
    assert whole["usage"]["output_tokens_details"] == {"reasoning_tokens": 3}
    deltas = [(each["type"], each["output_index"]) for each in found if each["type"].endswith("delta")]
    assert deltas == [("response.reasoning_text.delta", 0)] * 2 + [("response.output_text.delta", 1)] * 2
    assert [each["item"]["status"] for each in found if each["type"].endswith("item.done")] == ["completed"] * 2


class SayingLikely(Saying):
    """Says a given text, with the log probability of each token."""

    @property
    def logprobs(self) -> list[SimpleNamespace]:
        return [SimpleNamespace(chosen=-1.0, top=[(token, -1.0)]) for token in self.ids]


@pytest.mark.parametrize("most", [2, 200])
def test_shapes_are_those_of_openai(saved, qa, tmp_path, monkeypatch, most):
    """For a model that thinks, with log probabilities and characters of several tokens; cut inside its thoughts, and complete."""
    pytest.importorskip("openai")
    from openai.types.chat import ChatCompletion, ChatCompletionChunk
    from openai.types.responses import Response, ResponseStreamEvent
    from pydantic import TypeAdapter

    def check(kind: type, value: dict) -> None:
        TypeAdapter(kind).validate_json(json.dumps(value), strict=True)

    tokenizer = thinking_tokenizer("unless off", special=None)
    said = "It turns.</think>L\N{LATIN SMALL LETTER E WITH ACUTE}ft\N{SNOWMAN}"
    monkeypatch.setattr("evoprune.language.answer.TokenStream", lambda *given: SayingLikely(tokenizer, said)(*given))
    thinks = VideoQA(replace(load_model(str(saved), dtype="fp32", pack=False), tokenizer=tokenizer), budget=0.5)
    with serving(qa, tmp_path, {"thinks": thinks}) as server:
        given = {"model": "thinks", "think": True}
        whole = answer(server, **given, max_output_tokens=most, **LOGPROBS)
        check(Response, whole)
        found = events(server, **given, max_output_tokens=most, **LOGPROBS)
        for each in found:
            check(ResponseStreamEvent, each)
        ended = [each["item"] for each in found if each["type"] == "response.output_item.done"]
        assert ended == found[-1]["response"]["output"] and same(found[-1]["response"]) == same(whole)
        assert [item["type"] for item in ended] == ["reasoning", "message"]
        chances = ended[1]["content"][0]["logprobs"]
        assert len(chances) == whole["usage"]["output_tokens"] == min(most, len(chances))
        assert b"".join(bytes(chance["bytes"]) for chance in chances).decode() == (said if most > 2 else "It")
        given |= {"max_tokens": most, "logprobs": True, "top_logprobs": 2}
        chat = server.client.post(CHAT, json=body(**given)).json()
        check(ChatCompletion, chat)
        assert chat["choices"][0]["message"]["content"] == ended[1]["content"][0]["text"]
        with server.client.stream("POST", CHAT, json=body(stream=True, **given)) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        for line in lines[:-1]:
            check(ChatCompletionChunk, json.loads(line))


def test_an_error_in_a_stream_is_its_last_event():
    from evoprune_serve.responses import ResponseReply
    from evoprune_serve.work import Piece

    reply = ResponseReply("demo", {})
    reply.begin()
    reply.piece(Piece("gr", False, None))
    name, data = reply.failed(ApiError(504, "too late")).decode().split("\n")[:2]
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and event["response"]["status"] == "failed"
    assert event["response"]["error"] == {"code": "server_error", "message": "too late"}
    assert event["response"]["output"][0]["status"] == "incomplete"


def read(**given):
    from evoprune_serve.responses import read_response

    return read_response(asked(**given), USUAL, ["demo", "other"])


def test_a_conversation_has_instructions_and_items_of_earlier_answers():
    earlier = {
        "type": "message", "role": "assistant", "id": "msg_1", "status": "completed", "phase": "final_answer",
        "content": [{"type": "output_text", "text": "green", "annotations": [], "logprobs": []}],
    }  # fmt: skip
    first = asked()["input"][0]
    items = [
        {"role": "developer", "content": "Be kind."},
        first,
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
        earlier,
        {"role": "user", "content": "Why?"},
    ]
    question, sources, _ = read(input=items, instructions="Be brief.")
    assert question.generation.system == "Be brief.\nBe kind."
    assert question.earlier == ({"role": "user", "content": COLOUR}, {"role": "assistant", "content": "green"})
    assert question.text == "Why?" and len(sources) == 1


def test_options():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    question, _, reply = read(
        model="other",
        max_output_tokens=9,
        text={"format": form, "verbosity": "medium"},
        fps=2,
        think=False,
        metadata={"a": "b"},
    )
    assert (question.model, question.generation.max_new_tokens, question.generation.schema) == ("other", 9, schema)
    assert (question.sampling.fps, question.generation.think, question.generation.logprobs) == (2, "off", None)
    begun = json.loads(reply.begin().split(b"\n")[1].removeprefix(b"data: "))["response"]
    assert (begun["metadata"], begun["max_output_tokens"], begun["text"]["format"]) == ({"a": "b"}, 9, form)
    *_, reply = read(tool_choice="none", parallel_tool_calls=False, text={"verbosity": "medium"}, prompt_cache_key="k")
    begun = json.loads(reply.begin().split(b"\n")[1].removeprefix(b"data: "))["response"]
    assert (begun["tool_choice"], begun["parallel_tool_calls"], begun["prompt_cache_key"]) == ("none", False, "k")
    assert begun["text"] == {"format": {"type": "text"}, "verbosity": "medium"} and begun["completed_at"] is None
    assert read(**LOGPROBS)[0].generation.logprobs == 2
    assert read(stop=["a"])[0].generation.stop == ["a"]
    neutral = {
        "store": False, "background": False, "reasoning": {"effort": "none"}, "truncation": "auto", "tools": [],
        "tool_choice": "auto", "parallel_tool_calls": True, "service_tier": "auto", "user": "a", "top_logprobs": None,
        "include": [],
        "prompt_cache_retention": "24h", "text": {"format": {"type": "text"}},
    }  # fmt: skip
    assert read(**neutral)[:2] == read()[:2]
    assert read(stream=True, stream_options={"include_obfuscation": False})[:2] == read(stream=True)[:2]
    assert read(reasoning={"effort": None, "summary": None})[:2] == read()[:2]


@pytest.mark.parametrize("text", [{}, {"format": None}, {"format": None, "verbosity": None}, {"verbosity": "medium"}])
def test_the_format_of_a_text_is_plain_unless_stated(server, text):
    reply = answer(server, text=text)
    stated = {name: value for name, value in text.items() if value}
    assert reply["text"] == {"format": {"type": "text"}} | stated
    assert reply["output"][0]["content"][0]["text"] == answer(server)["output"][0]["content"][0]["text"]


@pytest.mark.parametrize("text", ["plain", "", 3, False, ["plain"]])
def test_a_text_that_is_no_object_is_refused(server, text):
    response = server.client.post(RESPONSES, json=asked(text=text))
    assert response.status_code == 400
    problem = response.json()["error"]
    assert (problem["type"], problem["code"], problem["param"]) == ("invalid_request_error", "invalid_type", "text")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"store": True}, "store"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
        ({"background": True}, "background"),
        ({"truncation": "disabled"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 2}, "max_tokens"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"style": "a"}}, "text.style"),
        ({"input": "What?"}, "input"),
        ({"input": 3}, "input"),
        ({"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [VIDEO, {"type": "input_audio"}]}]}, "input[0].content[1].type"),
        ({"input": [{"role": "user", "content": [VIDEO]}]}, "input[0]"),
        ({"input": ["a"]}, "input[0]"),
        ({"messages": []}, "messages"),
        ({"user": "\ud800"}, None),
        ({"metadata": {"\ud800": "a"}}, None),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(given, param):
    with pytest.raises(ApiError) as caught:
        read(**given)
    assert (caught.value.status, caught.value.param) == (400, param) and caught.value.code
