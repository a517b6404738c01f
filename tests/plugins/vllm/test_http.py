"""The API server over HTTP, as the OpenAI client sees it."""

import json
import re

import pytest

from tests.plugins.vllm.server import RATE, data_url, message, request, serving
from tests.plugins.vllm.serving import NEW, SAMPLES, pruning

pytestmark = pytest.mark.vllm

PRUNING = ("--video-pruning-rate", "0.75", "--trust-request-mm-kwargs")


def questions() -> list[tuple[str, str, str]]:
    """Return the file of a sample, a question about it, and the answer, for each question."""
    rows = map(json.loads, (SAMPLES / "questions.jsonl").read_text("utf-8").splitlines())
    return [(row["video"], row["question"], row["answer"]) for row in rows]


def url_of(name: str) -> str:
    return data_url((SAMPLES / name).read_bytes())


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    files = ("--allowed-local-media-path", str(SAMPLES))
    with serving(tmp_path_factory.mktemp("server"), *PRUNING, *files) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    from openai import OpenAI

    return OpenAI(base_url=address, api_key="none", max_retries=0)


def said(client, *args, **options) -> str:
    return client.chat.completions.create(**request(*args, **options)).choices[0].message.content.strip()


def test_it_answers_as_in_process(client, start):
    """This also works with a file instead of a data URL, and with a different budget for each request."""
    from vllm import SamplingParams

    llm, greedy = start(**pruning(0.75), media_io_kwargs=RATE), SamplingParams(temperature=0, max_tokens=NEW)
    for budget in (None, 0.1):
        own = {} if budget is None else {"evoprune_budget": budget}
        chats = [message(url_of(name), question) for name, question, _ in questions()]
        outputs = llm.chat(chats, greedy, use_tqdm=False, mm_processor_kwargs=own)
        right = [output.outputs[0].text.strip() for output in outputs]
        assert [said(client, url_of(name), question, **own) for name, question, _ in questions()] == right
        if budget is None:
            files = [said(client, f"file://{SAMPLES / name}", question) for name, question, _ in questions()]
            assert files == right
            assert sum(a == row[2] for a, row in zip(right, questions(), strict=True)) >= 6


def test_the_client_s_code_of_the_page(address, monkeypatch, capsys):
    page = (SAMPLES.parent / "docs" / "serving.md").read_text("utf-8")
    blocks = [code for code in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "from vllm" not in code]
    monkeypatch.chdir(SAMPLES.parent)
    exec("\n".join(blocks).replace("http://127.0.0.1:8000/v1", address), {})  # the second block continues the first
    assert capsys.readouterr().out.split() == ["green", "green"]


COLOUR, GOOD = "What colour is the square?", url_of("square.mp4")
BROKEN = [  # requests that must fail, and the error message
    (request(GOOD, COLOUR, evoprune_budget=2), "not a share"),
    (request(GOOD, COLOUR, evoprune_budget="auto"), "does not work here"),
    (request(GOOD, COLOUR, evoprune_budget={"share": 0.5}), None),
    (request(GOOD, COLOUR, evoprune_method="tome"), "no option"),
    (request(GOOD, COLOUR, patch_size=8), "fixed by the model"),
    (request(GOOD, COLOUR, videos_kwargs={"temporal_patch_size": 4}), "fixed by the model"),
    (request(GOOD, "word " * 5000), None),
    (request(data_url((SAMPLES / "square.mp4").read_bytes()[:200]), COLOUR), None),
    (request(data_url(b"no video"), COLOUR), None),
    (request("data:video/mp4;base64,@@@", COLOUR), None),
    (request(f"file://{SAMPLES.parent / 'pyproject.toml'}", COLOUR), None),
]


@pytest.mark.parametrize("number", range(len(BROKEN)))
def test_a_bad_request_is_the_client_s_error(client, number):
    from openai import APIStatusError

    made, says = BROKEN[number]
    with pytest.raises(APIStatusError, match=says) as caught:
        client.chat.completions.create(**made)
    assert caught.value.status_code in (400, 422)
    assert said(client, GOOD, COLOUR) == "green"
