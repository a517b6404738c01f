"""The API server over HTTP, as the OpenAI client sees it."""

import asyncio
import json
import random
import re

import pytest

from tests.plugins.vllm.server import RATE, data_url, message, request, serving
from tests.plugins.vllm.serving import NEW, SAMPLES, pruning

pytestmark = pytest.mark.vllm

REQUESTS, AT_ONCE = 200, 16
PRUNING = ("--video-pruning-rate", "0.75", "--trust-request-mm-kwargs")


def questions() -> list[tuple[str, str, str]]:
    """The file of a sample, a question about it, and the answer."""
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
    """Also with a file in the place of a data URL, and with budgets of requests."""
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
    exec("\n".join(blocks).replace("http://127.0.0.1:8000/v1", address), {})  # the second goes on from the first
    assert capsys.readouterr().out.split() == ["green", "green"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"evoprune_budget": 2}, "not a share"),
        ({"evoprune_budget": "auto"}, "does not work here"),
        ({"evoprune_method": "tome"}, "no option"),
    ],
)
def test_a_bad_option_is_the_client_s_error(client, options, says):
    from openai import BadRequestError

    with pytest.raises(BadRequestError, match=says):
        said(client, url_of("square.mp4"), "What colour is the square?", **options)
    assert said(client, url_of("square.mp4"), "What colour is the square?") == "green"


def broken() -> list[dict]:
    """Requests that must fail, each in another way."""
    video = (SAMPLES / "square.mp4").read_bytes()
    good = url_of("square.mp4")
    return [
        request(data_url(video[:200]), "What colour is the square?"),
        request(data_url(b"no video"), "What colour is the square?"),
        request("data:video/mp4;base64,@@@", "What colour is the square?"),
        request(good, "What colour is the square?", evoprune_budget=0),
        request(good, "What colour is the square?", evoprune_budget={"share": 0.5}),
        request(good, "What colour is the square?", evoprune_seed=1),
        request(good, "word " * 5000),
        request(f"file://{SAMPLES.parent / 'pyproject.toml'}", "What is it?"),
    ]


@pytest.mark.slow
def test_two_hundred_requests_of_which_some_are_broken(address):
    """None is lost, none is mixed up. Some clients leave before they have an answer."""
    from openai import APIStatusError, APITimeoutError, AsyncOpenAI

    async def run():
        client = AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=300)
        gate = asyncio.Semaphore(AT_ONCE)

        async def ask(made: dict) -> str:
            answer = await client.chat.completions.create(**made)
            return answer.choices[0].message.content

        async def result(kind: str, made: dict) -> str:
            async with gate:
                try:
                    return await ask(made | ({"timeout": 0.05} if kind == "leaves" else {}))
                except APIStatusError as problem:
                    return f"error {problem.status_code}"
                except APITimeoutError:
                    return "left"

        options = [{}, {"evoprune_budget": 0.1}, {"evoprune_budget": "50%"}]
        known = [request(url_of(name), question, **own) for name, question, _ in questions() for own in options]
        right = [await ask(made) for made in known]
        order = random.Random(0)
        kinds = order.choices(["good", "broken", "leaves"], [8, 1.5, 0.5], k=REQUESTS)
        picks = [order.randrange(len(broken() if kind == "broken" else known)) for kind in kinds]
        bad = broken()
        made = [bad[i] if kind == "broken" else known[i] for kind, i in zip(kinds, picks, strict=True)]
        found = await asyncio.gather(*map(result, kinds, made))
        await client.close()
        return kinds, picks, right, found

    kinds, picks, right, found = asyncio.run(run())
    assert len(found) == REQUESTS and len(set(right)) > 10
    for kind, i, answer in zip(kinds, picks, found, strict=True):
        if kind == "good":
            assert answer == right[i]
        elif kind == "leaves":
            assert answer in ("left", right[i])
        else:
            assert answer in ("error 400", "error 422"), answer
