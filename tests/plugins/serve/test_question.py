"""Request bodies: how they are parsed, and how invalid ones are refused."""

import re

import pytest

from evoprune.session import PipelineOptions
from evoprune_serve.chat import OWN_NEUTRAL, read_chat
from evoprune_serve.errors import ApiError
from evoprune_serve.question import NEUTRAL
from evoprune_serve.responses import read_response
from evoprune_serve.sources import Address, FrameList, Uploaded
from tests.plugins.serve.serving import COLOUR, message, video

SHOWN = video("data:video/mp4;base64,AAAA")
USUAL = PipelineOptions.of(max_new_tokens=40, fps=1.0, budget=0.5)


def read(**given):
    """Return the question and its sources."""
    question, sources, _ = read_chat({"messages": [message(COLOUR, SHOWN)]} | given, USUAL, ["demo", "other"])
    return question, sources


def refusal(**given) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(**given)
    return caught.value


def test_what_a_request_does_not_say_is_as_the_server_was_started():
    question, sources = read()
    assert (question.text, question.earlier, question.seed, question.stream) == (COLOUR, (), None, False)
    assert (question.generation, question.sampling, question.pruning) == (
        USUAL.generation,
        USUAL.sampling,
        USUAL.pruning,
    )
    assert sources == (Address("data:video/mp4;base64,AAAA"),)
    assert read(temperature=None, stop=None, no_such_option=None)[0] == question


def test_options_have_the_names_of_openai_and_of_evoprune():
    question, _ = read(
        model="demo",
        temperature=0.5,
        top_p=0.9,
        seed=7,
        max_completion_tokens=9,
        stop=["a", "b"],
        logprobs=True,
        top_logprobs=3,
        stream=True,
        stream_options={"include_usage": True},
        budget="fast",
        method="evoprune:reuse=5:count=0",
        frames=8,
        seek="exact",
        start="0:01",
        end=4,
        think=False,
    )
    generation = question.generation
    assert (generation.temperature, generation.top_p, generation.max_new_tokens) == (0.5, 0.9, 9)
    assert (generation.stop, generation.logprobs, generation.think) == (["a", "b"], 3, "off")
    assert (question.seed, question.stream) == (7, True)
    sampling = question.sampling
    assert (sampling.fps, sampling.frames, sampling.seek, sampling.start_s, sampling.end_s) == (
        None,
        8,
        "exact",
        1.0,
        4,
    )
    assert (question.pruning.budget, question.pruning.method) == ("fast", "evoprune:reuse=5:count=0")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"tempeature": 1}, "tempeature"),
        ({"best_of": 2}, "best_of"),
        ({"n": 2}, "n"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"tools": [{}]}, "tools"),
        ({"store": True}, "store"),
        ({"user": 3}, "user"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens"),
        ({"max_tokens": "3"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"method": "operations:recipe=/etc/passwd"}, "method"),
        ({"speech": "/etc"}, "speech"),
        ({"speech": True}, "speech"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}},
            "response_format.json_schema.schema",
        ),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": COLOUR}]}, "messages"),
        ({"messages": [message(COLOUR, SHOWN), {"role": "user", "content": "?"}]}, "messages[1].role"),
        ({"messages": [message(COLOUR, SHOWN), {"role": "assistant", "content": "?"}]}, "messages"),
        ({"messages": [message(COLOUR, SHOWN) | {"name": "Ann"}]}, "messages[0].name"),
        ({"messages": [message(" ", SHOWN)]}, "messages[0]"),
        ({"messages": [message(COLOUR, {"type": "input_audio"})]}, "messages[0].content[0].type"),
        ({"messages": [message(COLOUR, SHOWN | {"fps": 2})]}, "messages[0].content[0].fps"),
        ({"messages": [message(COLOUR, {"type": "video", "video": []})]}, "messages[0].content[0].video"),
        ({"messages": [message(COLOUR, {"type": "video", "video": ["a"]})]}, "messages[0].content[0].video"),
        (
            {"messages": [message(COLOUR, {"type": "video", "video": ["a"], "times_s": [10**400]})]},
            "messages[0].content[0].times_s",
        ),
        (
            {"messages": [message(COLOUR, {"type": "video", "video": ["a"], "fps": 10**400})]},
            "messages[0].content[0].fps",
        ),
        ({"messages": [message(COLOUR, *[SHOWN] * 65)]}, "messages"),
        ({"messages": [message(COLOUR, *[{"type": "text", "text": "a"}] * 10_000)]}, "messages"),
    ],
)
def test_what_is_wrong_is_named(given, param):
    problem = refusal(**given)
    assert (problem.status, problem.param) == (400, param) and problem.code


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"max_tokens": 0},
        {"max_completion_tokens": 0},
        {"budget": 7},
        {"method": "no-such-method"},
        {"fps": 0},
        {"seek": "now"},
        {"start": "soon"},
        {"end": "later"},
        {"think": "loudly"},
        {"top_logprobs": 50, "logprobs": True},
    ],
)
def test_values_out_of_range_are_refused_as_everywhere(given):
    field = next(iter(given))
    problem = refusal(**given)
    assert (problem.code, problem.param) == ("invalid_value", field)
    assert not re.search("max_new_tokens|_s is", problem.message)


def test_values_that_exclude_each_other():
    problem = refusal(fps=1, frames=2)
    assert (problem.code, problem.param) == ("invalid_value", "frames")


def test_another_model_is_not_there():
    problem = refusal(model="gpt-9")
    assert (problem.status, problem.code, problem.param) == (404, "model_not_found", "model")


def test_values_that_change_nothing_are_accepted():
    neutral = {
        "n": 1, "frequency_penalty": 0.0, "presence_penalty": 0, "logit_bias": {}, "store": False, "tools": [],
        "functions": [], "function_call": "none", "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"],
        "service_tier": "auto", "verbosity": "medium", "user": "ann",
        "safety_identifier": "a", "prompt_cache_key": "b", "prompt_cache_retention": "in_memory", "metadata": {"a": "b"},
    }  # fmt: skip
    assert neutral.keys() == (NEUTRAL | OWN_NEUTRAL).keys()
    assert read(**neutral) == read()


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ({"type": "image_url", "image_url": {"url": "u", "detail": "high"}}, Address("u")),
        ({"type": "image_url", "image_url": "u"}, Address("u")),
        ({"type": "video_url", "video_url": {"url": "u"}}, Address("u")),
        ({"type": "input_image", "image_url": "u", "detail": "auto"}, Address("u")),
        ({"type": "input_image", "file_id": "file-1"}, Uploaded("file-1")),
        ({"type": "input_video", "video_url": "u"}, Address("u")),
        ({"type": "input_video", "file_id": "file-1"}, Uploaded("file-1")),
        (
            {"type": "input_video", "input_video": {"data": "AA", "format": "webm"}},
            Address("data:video/webm;base64,AA"),
        ),
        (
            {"type": "input_video", "input_video": {"data": "data:video/webm;base64,AA"}},
            Address("data:video/webm;base64,AA"),
        ),
        ({"type": "file", "file": {"file_id": "file-1"}}, Uploaded("file-1")),
        ({"type": "file", "file": {"file_data": "u", "filename": "a.mp4"}}, Address("u")),
        ({"type": "input_file", "file_id": "file-1"}, Uploaded("file-1")),
        ({"type": "video", "video": "u"}, Address("u")),
        ({"type": "video", "video": ["a", "b"], "fps": 2}, FrameList((Address("a"), Address("b")), 2, None)),
        (
            {"type": "video", "video": ["a", {"file_id": "file-1"}], "times_s": [0, 1.5]},
            FrameList((Address("a"), Uploaded("file-1")), None, (0.0, 1.5)),
        ),
    ],
)
def test_every_form_of_a_video_or_a_picture(part, source):
    assert read(messages=[message(COLOUR, part)])[1] == (source,)


def test_a_conversation_has_turns_and_a_system_prompt():
    answered = {"role": "assistant", "content": "green", "refusal": None, "tool_calls": None, "reasoning_content": "x"}
    question, sources = read(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            message("What is it?", SHOWN),
            answered,
            message(COLOUR, video("u")),
        ]
    )
    assert question.generation.system == "Be brief.\nBe kind."
    assert question.earlier == (
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "green"},
    )
    assert question.text == COLOUR and len(sources) == 2


@pytest.mark.parametrize("answered", [{"content": None}, {"content": None, "reasoning_content": "x"}, {}])
def test_an_earlier_answer_may_have_no_content(answered):
    """For example, an answer that was cut inside its thoughts."""
    turns = [message("What is it?", SHOWN), {"role": "assistant"} | answered, message(COLOUR)]
    assert read(messages=turns)[0].earlier[1] == {"role": "assistant", "content": ""}
    with pytest.raises(ApiError, match="content is missing"):
        read(messages=[{"role": "user", "content": None}])


def texts(*parts):
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (["One:", SHOWN, "Two:", SHOWN, "Which?"], ("One:", None, "Two:", None, "Which?")),
        (["One:", "it", SHOWN, SHOWN, "Which?", "Why?"], ("One:\nit", None, None, "Which?\nWhy?")),
        (["Which?", "Why?", SHOWN], ("Which?\nWhy?", None)),
        ([SHOWN, "Which?", SHOWN], None),
        (["Which?", SHOWN], None),
        ([SHOWN, SHOWN, "Which?", "Why?"], None),
    ],
)
def test_texts_keep_their_places_between_videos_and_pictures(content, parts):
    """A single text comes after all inputs, wherever it is placed."""
    question, _ = read(messages=[{"role": "user", "content": texts(*content)}])
    assert getattr(question.text, "parts", None) == parts
    assert question.text == "\n".join(each for each in content if isinstance(each, str))


def test_videos_of_later_questions_keep_their_places_where_one_has_some():
    turns = [
        message("What?", SHOWN),
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": texts("This:", SHOWN, "Which?")},
    ]
    question, sources = read(messages=turns)
    assert question.earlier[0]["content"].parts == (None, "What?") and question.text.parts == ("This:", None, "Which?")
    assert len(sources) == 2


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"store": True}, "store is true, which"),
        ({"temperature": True}, "temperature is true, not a number"),
        ({"stop": [True, "a"]}, 'stop is [true, "a"], not a string or a list of strings'),
        ({"tools": [{"a": None}]}, 'tools is [{"a": null}], which'),
        ({"messages": [None]}, "messages[0] is null, not an object"),
        ({"messages": [message(COLOUR) | {"role": "tool"}]}, 'messages[0].role is "tool", not "user"'),
        ({"stream": "yes" * 30}, "stream is a text, not true or false"),
        ({"model": "other one"}, 'there is no model "other one", but "demo", "other"'),
    ],
)
def test_errors_show_values_as_json(given, says):
    assert says in refusal(**given).message


def test_schemas():
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}}
    pytest.importorskip("llguidance")
    wanted = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": schema}}
    assert read(response_format=wanted)[0].generation.schema == schema
    assert read(response_format={"type": "json_object"})[0].generation.schema == {"type": "object"}
    assert read(response_format={"type": "text"})[0] == read()[0]


def test_no_effort_means_no_thoughts():
    """This also works if the server was started with `--think on`. The server's own option takes precedence."""
    thinking = PipelineOptions.of(think="on")
    shown = [message(COLOUR, SHOWN)]
    content = [{"type": "input_file", "file_id": "file-1"}, {"type": "input_text", "text": COLOUR}]
    for read, given in (
        (read_chat, {"messages": shown, "reasoning_effort": "none"}),
        (read_response, {"input": [{"role": "user", "content": content}], "reasoning": {"effort": "none"}}),
    ):
        for own, think in (({}, "off"), ({"think": True}, "on")):
            assert read(given | own, thinking, ["demo"])[0].generation.think == think
    assert refusal(reasoning_effort="high").param == "reasoning_effort"


def test_texts_and_options_have_limits():
    """Invalid requests are refused quickly, and error messages do not repeat them in full."""
    words = "a" * 2**21
    for given, says in (
        ({"messages": [message(2 * words + "a", SHOWN)]}, "characters of text"),
        ({"messages": [{"role": "system", "content": 2 * words}, message(COLOUR, SHOWN)]}, "characters of text"),
        ({"metadata": {"a": words}}, "the options have more than"),
        ({"stop": [words]}, "the options have more than"),
        ({"seek": words[:-100]}, "seek"),
        ({"start": words[:-100]}, "a time"),
    ):
        with pytest.raises(ApiError) as caught:
            read(**given)
        assert caught.value.status == 400 and says in caught.value.message and len(caught.value.message) < 2100
