"""`evoprune ask --show`: the page with the answers and the frames, its bounds, and how it looks in Chromium."""

import base64
import io
import json
import re
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evoprune.report import Report, Times
from evoprune_cli import show
from tests.browser import Browser, chromium, in_browser
from tests.video.files import write_video

CLIP = "samples/square.mp4"
QUESTION = "What colour is the square?"
HOSTILE = "</script><script>document.title=1</script><!--<script>\u2028\u202e DATA /* drawing.js */"


def data(page: Path) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    return json.loads(text)


def pictures(about: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(base64.b64decode(each))) for each in about["images"]]


def test_the_page_agrees_with_the_record(cli, tmp_path):
    page = tmp_path / "page.html"
    result = cli("ask", CLIP, QUESTION, "--show", page, "--json", "--logprobs", "1", "-b", "0.25")
    record = result.record
    assert f"page: {page}" in result.err
    shown = data(page)
    (about,), (answer,) = shown["inputs"], shown["answers"]
    assert (answer["question"], answer["answer"]) == (QUESTION, "green")
    assert about["counts"]["units"] == 144 and about["grid"] == [6, 4, 6]
    read = str(about["fates"].index("read"))
    kept = record["pruning"]["kept_per_pair"]
    assert [units.count(read) for units in about["units"]] == kept == [bar[0] for bar in about["bars"]]
    assert [picture.size for picture in pictures(about)] == [(168, 112)] * 6 and about["size"] == [168, 112]
    assert about["times"] == record["sampling"]["timestamps_s"][::2]
    times = dict(answer["time_ms"])
    assert {"read", "encode", "prefill", "total", "ttft_wall", "startup", "load"} <= {*times}
    assert all(abs(record["time_ms"][name] - ms) < 0.001 for name, ms in times.items())
    assert answer["logprobs"][0]["token"] == record["logprobs"][0]["token"]
    tokens = record["tokens"]
    assert f"{tokens['prompt']} tokens read: {tokens['visual']} visual + {tokens['text']} text" in answer["tokens"]


def test_the_frames_are_the_first_of_their_pairs(cli, tmp_path):
    colours = np.repeat(np.arange(20, 240, 20, np.uint8), 3).reshape(-1, 1, 1, 3)
    clip = write_video(tmp_path / "steps.mp4", np.tile(colours, (1, 64, 96, 1)), fps=1)
    assert cli("ask", clip, QUESTION, "--show", tmp_path / "a.html", "--frames", "8", "-q").code == 0
    (about,) = data(tmp_path / "a.html")["inputs"]
    levels = [np.asarray(each).mean() for each in pictures(about)]
    expected = [20 + 20 * int(time_s) for time_s in about["times"]]
    assert len(levels) == 4 and np.allclose(levels, expected, atol=4)


def test_every_stage_has_a_place():
    assert sorted(show.ORDER) == sorted(field.name for field in fields(Times))


def test_several_inputs_questions_and_both_answers(cli, photo, tmp_path):
    page = tmp_path / "page.html"
    questions = ("-Q", QUESTION, "-Q", "What digit is it?")
    command = ("ask", CLIP, photo, *questions, "--compare", "--show", page, "-q", "--json")
    records = [json.loads(line) for line in cli(*command).out.splitlines()]
    shown = data(page)
    clip, image = shown["inputs"]
    assert (clip["name"], image["name"]) == ("square.mp4", "photo.jpg")
    assert image["times"] is None and len(image["images"]) == 1 and image["facts"].startswith("An image")
    for answer, record in zip(shown["answers"], records, strict=True):
        assert answer["answer"] == record["answer"] and answer["compare"]["answer"] == record["compare"]["answer"]
    kept = [each["pruning"]["visual_tokens_kept"] for each in records[0]["inputs"]]
    assert [each["counts"]["read"] for each in (clip, image)] == kept


def test_the_cache_is_not_used_and_the_user_is_told(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    command = ("ask", CLIP, QUESTION, "--cache", "--json")
    assert cli(*command).record["cache"] == "miss"
    result = cli(*command, "--show", tmp_path / "page.html")
    assert result.record["cache"] == "off" and "the inputs are encoded again" in result.err
    assert len(data(tmp_path / "page.html")["inputs"][0]["images"]) == 6
    assert cli(*command).record["cache"] == "hit"


def test_subtitles_and_choices_are_shown(cli, tmp_path):
    lines = tmp_path / "words.srt"
    lines.write_text("1\n00:00:01,000 --> 00:00:02,000\nhello\n")
    page = tmp_path / "page.html"
    command = ("ask", CLIP, QUESTION, "--subtitles", lines, "--choices", "green,red", "--show", page, "-q")
    assert cli(*command).code == 0
    shown = data(page)
    assert "1 line of words.srt in the prompt" in shown["inputs"][0]["facts"]
    assert (
        shown["answers"][0]["choices"][0]["text"] == "green" and shown["answers"][0]["choices"][0]["probability"] > 0.5
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--show", "{}/page.pdf"), "the page is an HTML file"),
        (("--show", "{}/gone/page.html"), "cannot write"),
        (("--show", "{}/page.html", "--method", "fastv"), "drops tokens based on the question, and a page shows"),
        (("--show", "{}/page.html", "--method", "cdpruner"), "reads the question, and a page shows the same units"),
        (("--show", "{}/page.html", "--via", "http://localhost:1"), "and --via asks a server"),
    ],
    ids=["ending", "folder", "language", "question", "server"],
)
def test_what_cannot_be_shown_is_refused_before_the_model_loads(cli, tmp_path, monkeypatch, more, says):
    monkeypatch.setattr("evoprune_cli.ask.load", lambda *_, **__: pytest.fail("the model was loaded"))
    result = cli("ask", CLIP, QUESTION, *(each.format(tmp_path) for each in more), "-q")
    assert result.code == 2 and says in result.err and len(result.err.splitlines()) == 2 and result.out == ""
    assert not list(tmp_path.iterdir())


def test_texts_of_strangers_stay_texts(cli, tmp_path):
    clip = tmp_path / "<img src=x onerror=alert(1)> caf\udce9.mp4"
    clip.write_bytes(Path(CLIP).read_bytes())
    page = tmp_path / "page.html"
    assert cli("ask", clip, HOSTILE, "--show", page, "-q", "-n", "4").code == 0
    raw = page.read_text()
    assert data(page)["answers"][0]["question"] == HOSTILE
    assert raw.count("<script") == raw.count("</script>") == 2 and "<img" not in raw and "\u202e" not in raw
    assert raw.count("function drawUnits") == 1
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\s(style|on\w+)=[\"']", raw)
    assert {*re.findall(r"https?://[^\s\"'`)]+", raw)} == {"http://www.w3.org/2000/svg"}


def test_the_size_is_bounded(cli, tmp_path, monkeypatch):
    """Even for noise, which compresses worst, with long texts and many answers."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 120, 160, 3), np.uint8)
    clip = write_video(tmp_path / "noise.mp4", noise, fps=2)
    monkeypatch.setattr(show, "MOST_FRAMES", 4)
    monkeypatch.setattr(show, "FRAME_BYTES", 10_000)
    monkeypatch.setattr(show, "TEXT_BYTES", 4_000)
    monkeypatch.setattr(show, "LONGEST_TEXT", 2_000)
    long = "word " * 500
    page = tmp_path / "page.html"
    asked = [word for number in range(4) for word in ("-Q", f"{number} {long}")]
    assert cli("ask", clip, *asked, "--frames", "30", "-n", "1", "--show", page, "-q").code == 0
    shown = data(page)
    (about,) = shown["inputs"]
    assert len(about["images"]) == len(about["units"]) == len(about["pairs"]) == 4 and len(about["bars"]) == 12
    assert sum(map(len, about["images"])) <= 10_000 and "4 of 12 frame pairs are shown" in about["note"]
    assert [answer["question"][0] for answer in shown["answers"]] == ["3"]
    assert (
        "Only the last 1 of 4 answers" in " ".join(shown["notes"])
        and "more characters" in shown["answers"][0]["question"]
    )


def test_more_inputs_than_frames(cli, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(show, "MOST_FRAMES", 2)
    assert cli("ask", photo, CLIP, photo, QUESTION, "--show", tmp_path / "a.html", "-q").code == 0
    shown = data(tmp_path / "a.html")
    assert [len(each["images"]) for each in shown["inputs"]] == [1, 1]
    assert shown["notes"] == ["Only the first 2 of 3 inputs are shown."]


def test_a_prompt_writes_its_page_at_the_end(keyboard, tmp_path):
    page = tmp_path / "page.html"
    screen, process = keyboard("ask", CLIP, "What digit is it?", "-i", "-q", "--show", page, stdout=None)
    screen.wait_for("> ")
    screen.press(f"{QUESTION}\n".encode())
    screen.wait_for("green")
    screen.press(b"q\n")
    assert process.wait(60) == 0
    screen.finish()
    assert [answer["question"] for answer in data(page)["answers"]] == ["What digit is it?", QUESTION]


def test_there_is_no_page_without_an_answer(tmp_path):
    page = show.Page(str(tmp_path / "a.html"), [CLIP])
    assert page.write() is False and not list(tmp_path.iterdir())
    page.add(Report(question="What?", answer="half", finish_reason="interrupt"))  # without any time or token count
    assert page.write() is True and data(tmp_path / "a.html")["answers"][0]["end"] == "The answer was interrupted."


@in_browser
def test_the_page_in_a_browser(cli, photo, tmp_path):
    """With the keyboard, on narrow and wide screens, in light and dark: no errors, no requests, and nothing of a stranger runs."""
    clip = tmp_path / "<img src=x onerror='document.title=1'>.mp4"
    clip.write_bytes(Path(CLIP).read_bytes())
    page = tmp_path / "page.html"
    command = (
        "ask",
        clip,
        photo,
        "-Q",
        QUESTION,
        "-Q",
        HOSTILE,
        "--compare",
        "--logprobs",
        "1",
    )
    assert cli(*command, "--show", page, "-q").code == 0
    with chromium(tmp_path / "chromium") as driver:
        browser = Browser(driver)
        driver.get(page.as_uri())
        for dark, width in ((False, 1280), (True, 1280), (False, 360), (True, 360)):
            browser.look(dark, width)
            browser.check_access()
        assert [each.text for each in browser.all("h2")][:2] == [clip.name, "photo.jpg"]
        assert driver.title == f"{QUESTION} – evoprune"
        slider, first = browser.all("input[type=range]")[0], browser.all(".stage canvas")[0]
        before = first.get_attribute("aria-label")
        assert before.startswith("0:00.3, frame pair 1 of 6: ") and "read" in before
        driver.execute_script("document.body.focus()")
        slider.send_keys("\ue014")  # the right arrow
        assert first.get_attribute("aria-label").startswith("0:01.3, frame pair 2 of 6")
        line = browser.all("canvas.line")[0]
        driver.execute_script("arguments[0].click()", line)  # at its left end
        assert first.get_attribute("aria-label") == before
        painted = (
            "const c = arguments[0]; return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some(Boolean)"
        )
        assert driver.execute_script(painted, first) and driver.execute_script(painted, line)
        browser.all("input[type=checkbox]")[0].send_keys(" ")
        assert not driver.execute_script(painted, first) and "read" not in first.get_attribute("aria-label")
        assert driver.execute_script("return [...document.images].every((each) => each.naturalWidth > 0)")
        assert {"encode", "prefill", "total"} <= {each.text for each in browser.all("article th")}
        assert browser.severe == []
        assert {url for url in browser.requests if not url.startswith(("data:", "chrome"))} == {page.as_uri()}
