"""The page at `/`: its requests to the server, and the page itself in Chromium."""

import base64
import hashlib
import json
import re
import shutil
import threading
import time
import tomllib
from pathlib import Path

import av
import pytest

from evoprune.bench import Fates, TracedVideo
from evoprune.bundled import DEMOS
from evoprune.report import VideoFacts, warning_text
from evoprune.video_qa import VideoQA
from tests.browser import Browser, chromium, in_browser
from tests.plugins.serve.serving import COLOUR, REASON, SAMPLES, body, memory_fails, message, serving, url_of, video

pytest.importorskip("starlette", reason=REASON)
pytest.importorskip("httpx", reason=REASON)
UNITS = "/page/units"
MOMENTS = "/page/moments"
KEY = "secret-key"
NO_PART_OF = '<img src=x onerror="document.title=1">.mp4'  # the name of a file


# Requests of the page.


def test_the_page_has_a_strict_policy_and_nothing_from_elsewhere(server):
    response = server.client.get("/")
    policy = response.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy and "*" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", response.text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"""\s(style|on\w+)=["']""", response.text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", response.text)
    outside = set(re.findall(r"https?://[^\s\"'`)]+", response.text))
    assert outside <= {"http://www.w3.org/2000/svg", "https://example.org/clip.mp4"}
    assert server.client.post("/").status_code == 405


def test_videos_on_the_web_are_played_where_addresses_are_allowed(qa, tmp_path):
    with serving(qa, tmp_path, urls=True) as server:
        policy = server.client.get("/").headers["content-security-policy"]
        assert "media-src blob: https: http:;" in policy and "img-src data: blob: https: http:;" in policy
        assert server.client.get("/page/settings").json()["urls"] is True


def test_settings(server):
    settings = server.client.get("/page/settings").json()
    assert settings["models"] == [{"name": "demo", "files": [], "demo": True, "overlay": True}]
    assert settings["budget"] in [each["budget"] for each in settings["budgets"]]
    shares = [each["share"] for each in settings["budgets"]]
    assert shares == sorted(shares) and shares[-1] == 1
    assert not any("{" in text or "?," in text for text in settings["warnings"].values())
    # Visitors set no options and do not read this project's documents.
    commands = r"(^|\W)--?[a-z]|docs/|samples/|ffmpeg|`|=True|max_"
    assert [text for text in settings["warnings"].values() if re.search(commands, text)] == []


def test_what_demos_know_and_whom_the_sample_suits(qa, tmp_path):
    copy = shutil.copytree(
        DEMOS["demo"].folder, tmp_path / "copy"
    )  # in another folder, it counts as a model of its own
    others = {"scenes": VideoQA.load("demo-scenes"), "other": VideoQA.load(copy)}
    with serving(qa, tmp_path / "files", others) as server:
        settings = server.client.get("/page/settings").json()
    assert settings["demos"] == {"demo": "colored shapes and digits", "scenes": "crowded scenes with signs"}
    assert all(words in warning_text("demo_model", VideoFacts(), "it") for words in settings["demos"].values())
    assert settings["sample"]["models"] == ["demo", "other"]


def test_the_sample_is_a_part_of_the_package(server, qa, tmp_path):
    reply = server.client.get("/page/sample")
    assert reply.headers["content-type"] == "video/mp4" and len(reply.content) < 2**18
    (tmp_path / "sample.mp4").write_bytes(reply.content)
    sample = server.client.get("/page/settings").json()["sample"]
    answer = qa.ask(tmp_path / "sample.mp4", sample["question"])
    assert answer.text == "red diamond" and not answer.report.warnings
    assert qa.find(tmp_path / "sample.mp4", sample["query"])
    project = tomllib.loads((SAMPLES.parent / "plugins/serve/pyproject.toml").read_text("utf-8"))
    assert {"page.html", "sample.mp4"} <= set(project["tool"]["setuptools"]["package-data"]["evoprune_serve"])


def test_the_picture_of_the_page_is_small_and_shown():
    from PIL import Image

    file = SAMPLES.parent / "docs/page.png"
    assert file.stat().st_size <= 80 * 1024 and Image.open(file).width <= 1280
    assert "(page.png)" in (SAMPLES.parent / "docs/server.md").read_text("utf-8")
    assert "docs/page.png" in (SAMPLES.parent / "README.md").read_text("utf-8")


def test_the_overlay_is_off_at_first_and_its_switch_is_beside_the_player(server):
    html = server.client.get("/").text
    player = html[html.index('id="player"') : html.index('id="upload"')]
    assert '<input type="checkbox" id="show">' in player


@pytest.mark.parametrize(("usual", "share"), [(0.33, 0.33), ("auto", None), ("fast", 0.1)])
def test_the_usual_budget_is_one_to_choose(usual, share):
    from evoprune.session import PipelineOptions
    from evoprune_serve.page import budgets

    found = budgets(PipelineOptions.of(budget=usual))
    still = {"fast": 0.3}.get(usual, share)
    assert {"budget": usual, "share": share, "still": still} in found


@pytest.mark.parametrize("budget", [0.1, "full"])
def test_units_are_those_of_the_overlay(server, qa, budget):
    right = TracedVideo.trace(qa.__class__(qa.loaded, budget=budget).session, SAMPLES / "pan.mp4")
    found = server.client.post(UNITS, json=body("Which digit is shown?", "pan.mp4", budget=budget)).json()
    assert found["grid"] == list(right.plan.grid) and found["fates"] == list(Fates.NAMES)
    assert "".join(found["units"]) == "".join(map(str, right.fates.fate.tolist()))
    assert found["counts"] == right.fates.counts()
    units = right.plan.grid[1] * right.plan.grid[2]
    for pair, merged in enumerate(found["merged"]):
        for unit, owner in zip(merged[::2], merged[1::2], strict=True):
            assert right.fates.owner[pair * units + unit] == pair * units + owner != pair * units + unit
    assert found["time_ms"]["encode"] > 0 and found["time_ms"]["prefill"] > 0 and found["warnings"] == []
    reply = server.client.post("/v1/chat/completions", json=body("Which digit is shown?", "pan.mp4", budget=budget))
    assert reply.json()["usage"]["evoprune"]["encoding_kept"] is True


def test_moments_are_those_of_video_qa(server, qa):
    right = qa.find(SAMPLES / "flash.mp4", "red diamond")
    given = body("red diamond", "flash.mp4")
    found = server.client.post(MOMENTS, json=given).json()
    # The server's thread may compute with another number of threads, which changes the last bits of a score.
    expected = [{"start_s": each.start_s, "end_s": each.end_s, "score": pytest.approx(each.score)} for each in right]
    names = ("start_s", "end_s", "score")
    assert expected == [{name: each[name] for name in names} for each in found["moments"]] != []
    with server.client.stream("POST", MOMENTS, json=given | {"stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    *steps, last = map(json.loads, lines)
    assert steps[0] == {"stage": "segment", "done": 1, "of": 1} and last == found


def test_what_is_refused(server, qa, tmp_path):
    two = {"messages": [message(COLOUR, video(url_of("square.mp4")), video(url_of("three.mp4")))]}
    for path in (UNITS, MOMENTS):
        problem = server.client.post(path, json=two)
        assert problem.status_code == 400 and "takes exactly one" in problem.json()["error"]["message"]
        assert server.client.post(path, json=body(unknown=1)).status_code == 400
        broken = {"messages": [message(COLOUR, video("data:video/mp4;base64,AAAA"))]}
        assert server.client.post(path, json=broken).json()["error"]["code"] == "invalid_video"
        assert server.client.post(path, json=broken | {"stream": True}).status_code == 400
    problem = server.client.post(UNITS, json=body(method="fastv"))
    assert problem.status_code == 400 and "overlay" in problem.json()["error"]["message"]
    assert server.client.post(UNITS, json=body()).status_code == 200


def test_without_memory_what_is_kept_goes_first(server, monkeypatch):
    server.client.post("/v1/chat/completions", json=body())
    memory_fails(monkeypatch, times=1)
    assert server.client.post(UNITS, json=body(name="three.mp4")).status_code == 200
    assert len(server.state.work.kept) == 1


def test_a_search_is_given_up_when_its_client_goes(server, monkeypatch):
    import httpx

    from evoprune.moments import Search
    from evoprune_serve.work import Gone

    begun = threading.Event()
    ended = threading.Event()

    def run(search, progress):
        try:
            for done in range(10_000):
                progress("segment", done, 10_000)
                begun.set()
                time.sleep(0.01)
        except Gone:
            ended.set()
            raise

    monkeypatch.setattr(Search, "run", run)
    with httpx.stream("POST", server.url + MOMENTS, json=body("red diamond", stream=True), timeout=60) as response:
        assert response.status_code == 200 and begun.wait(30)
    assert ended.wait(30)
    assert server.client.post(UNITS, json=body()).status_code == 200


def test_all_but_the_page_needs_the_key(qa, tmp_path):
    from evoprune_serve.guard import Access

    with serving(qa, tmp_path, access=Access(key=KEY)) as server:
        page = server.client.get("/")
        assert page.status_code == 200 and "demo</" not in page.text
        assert server.client.get("/page/settings").status_code == 401
        assert server.client.post(UNITS, json=body()).status_code == 401
        allowed = server.client.get("/page/settings", headers={"Authorization": f"Bearer {KEY}"})
        assert allowed.status_code == 200


# In Chromium.

DROP = """
const [name, data] = arguments;
const bytes = Uint8Array.from(atob(data), (each) => each.charCodeAt(0));
const dataTransfer = new DataTransfer();
dataTransfer.items.add(new File([bytes], name, {type: "video/mp4"}));
document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer, bubbles: true, cancelable: true}));
"""
# The share of overlay pixels that are not transparent, and the sum of their colors.
PIXELS = """
const canvas = document.getElementById("overlay");
const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
const drawn = data.filter((value, place) => place % 4 === 3 && value).length;
return [drawn / (data.length / 4), data.reduce((sum, value) => sum + value, 0)];
"""


class PageBrowser(Browser):
    """Chromium with a page of a server open."""

    def open(self, url: str) -> None:
        self.driver.get(url)
        self.until(lambda: self.get("watch").is_displayed() or self.get("access").is_displayed())

    def drop(self, name: str | Path, called: str | None = None) -> None:
        path = SAMPLES / name
        self.driver.execute_script(DROP, called or path.name, base64.b64encode(path.read_bytes()).decode())
        self.until(self.get("send").is_enabled)

    def ask(self, question: str) -> str:
        """Ask a question and return the displayed answer."""
        count = len(self.all("#answers article"))
        self.get("question").clear()
        self.get("question").send_keys(question, "\ue007")  # the key Enter
        self.until(lambda: len(self.all("#answers article details")) > count)
        return self.all("#answers .answer")[0].text

    def pixels(self) -> list[float]:
        return self.driver.execute_script(PIXELS)


@pytest.fixture
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield PageBrowser(driver)


@in_browser
def test_a_video_is_dropped_asked_about_and_looked_through(server, browser):
    """The answer, the overlay at two budgets, a moment; no requests to other hosts, and no browser messages."""
    browser.open(server.url)
    browser.check_access()
    assert not browser.get("send").is_enabled() and browser.text("name") == ""
    browser.drop("square.mp4")
    assert browser.ask(COLOUR) == "green"
    facts = browser.all("#answers article .figures")[0].text
    assert "visual tokens" in facts and "first word after" in facts
    browser.all("#answers summary")[0].click()
    assert "Answer" in browser.all("#answers table")[0].text

    label = browser.get("overlay").get_attribute
    browser.until(lambda: browser.text("legend"))
    assert browser.pixels()[0] == 0 and label("aria-label") == "No overlay"
    browser.get("show").click()
    browser.until(lambda: "read" in label("aria-label"))
    share, before = browser.pixels()
    assert share > 0.9
    assert "25% (balanced)" in browser.text("share")
    browser.get("budget").send_keys("\ue012")  # the left arrow
    assert "15%" in browser.text("share")
    browser.until(lambda: "read" in label("aria-label") and browser.pixels()[1] not in (0, before))
    times = [each.text.split("\n")[1] for each in browser.all("#ticks li")]
    assert [time.endswith(" s") for time in times] == [place in (2, 3) for place in range(len(times))]
    assert "first word after" in browser.get("budget").get_attribute("aria-valuetext")
    browser.get("show").click()
    assert browser.pixels() == [0, 0] and label("aria-label") == "No overlay"
    browser.get("show").click()
    assert browser.pixels()[0] > 0.9

    browser.get("another").click()
    browser.drop("flash.mp4")
    browser.get("query").send_keys("red diamond", "\ue007")
    (moment,) = browser.until(lambda: browser.all("#moments button"))
    browser.driver.execute_script("document.getElementById('video').currentTime = 5")
    browser.until(lambda: browser.text("time").startswith("0:05.0"))
    moment.click()
    start = moment.text.split(" ")[0]
    browser.until(lambda: browser.text("time").startswith(start))
    (mark,) = browser.all("#marks button")
    assert mark.rect["width"] > 5 and moment.get_attribute("aria-current") == "true"
    for dark, width in ((False, 1280), (True, 1280), (False, 360), (True, 360)):
        browser.look(dark, width)
        browser.check_access()

    browser.get("another").click()
    browser.until(lambda: not server.state.uploads._uploads)  # they are deleted on the server
    inside = (server.url, "blob:", "data:", "about:", "chrome")  # the last are pages of the browser itself
    assert not {url for url in browser.requests if not url.startswith(inside)}
    assert browser.severe == []


@in_browser
def test_the_first_minute(qa, tmp_path, browser):
    """With the keyboard only, and with a key: the demo says what it is, and a sample is asked about."""
    from evoprune_serve.guard import Access

    with serving(qa, tmp_path, access=Access(key=KEY)) as server:
        browser.open(server.url)
        browser.look(width=360)
        assert not browser.get("demo").is_displayed()
        browser.get("key").send_keys(KEY, "\ue007")
        browser.until(browser.get("watch").is_displayed)
        for told in (
            "This is a demo model",
            "colored shapes and digits",
            "evoprune serve -m Qwen/Qwen2.5-VL-3B-Instruct",
        ):
            assert told in browser.text("demo")
        assert "too small for a speedup" in browser.text("too-small")
        browser.check_access()
        active = browser.driver.switch_to
        assert active.active_element.get_attribute("id") == "pick"
        active.active_element.send_keys("\t")
        assert active.active_element.get_attribute("id") == "try"
        active.active_element.send_keys("\ue007")
        browser.until(lambda: active.active_element.get_attribute("id") == "question")
        active.active_element.send_keys("\ue007")
        browser.until(lambda: browser.all("#answers article details"))
        assert browser.all("#answers .answer")[0].text == "red diamond"
        browser.get("search").click()
        browser.until(lambda: browser.all("#moments button"))
        browser.check_access()
        browser.get("another").click()
        assert [browser.get(each).get_attribute("value") for each in ("question", "query")] == ["", ""]
        assert [each for each in browser.severe if "401" not in each] == []


@in_browser
def test_a_real_model_is_no_demo(qa, tmp_path, browser):
    real = VideoQA.load(shutil.copytree(DEMOS["demo"].folder, tmp_path / "copy"))
    with serving(qa, tmp_path / "files", {"real": real, "scenes": VideoQA.load("demo-scenes")}) as server:
        browser.open(server.url)
        for place, demo, sample in ((1, False, True), (2, True, False), (0, True, True)):
            browser.all("#models option")[place].click()
            browser.until(lambda demo=demo: browser.get("demo").is_displayed() is demo)
            assert browser.get("too-small").is_displayed() is demo
            assert browser.get("try").is_displayed() is sample
            assert not demo or "choose another model above" in browser.text("demo")


@in_browser
def test_a_conversation_goes_on(server, browser):
    browser.open(server.url)
    browser.drop("square.mp4")
    browser.get("remember").click()
    chat = server.state.models["demo"].encode(SAMPLES / "square.mp4").chat()
    for question in ("What happens to the square?", COLOUR):
        assert browser.ask(question) == chat.ask(question).text
    assert "earlier" in browser.text("answers") or "trained on single questions" in browser.text("answers")


@in_browser
def test_another_model_is_chosen(qa, tmp_path, browser):
    """Models can be chosen only if there are several. Counts, overlay and answers then come from the chosen model."""
    other = VideoQA.load("demo-scenes", method="divprune")
    inner = VideoQA.load("demo", method="fastv")  # it has no overlay
    with serving(qa, tmp_path, {"scenes": other, "organisation/model-of-a-long-name-" * 5: inner}) as server:
        browser.open(server.url)
        assert browser.text("model") == "evoprune"
        browser.check_access()
        browser.drop("square.mp4")
        assert browser.ask(COLOUR) == "green"
        assert browser.all("#answers article .figures")[0].text.startswith("demo · ")
        browser.get("show").click()
        browser.until(lambda: browser.pixels()[0] > 0.9)
        browser.get("models").send_keys("scenes")
        browser.until(lambda: browser.get("models").get_attribute("value") == "scenes")
        assert browser.ask(COLOUR) == other.encode(SAMPLES / "square.mp4").ask(COLOUR).text
        assert browser.all("#answers article .figures")[0].text.startswith("scenes · ")
        times = [each.text.split("\n")[1] for each in browser.all("#ticks li")]
        assert sum(time.endswith(" s") for time in times) == 1
        browser.get("show").click()
        for place, offered in ((2, False), (0, True)):
            browser.all("#models option")[place].click()
            browser.until(lambda offered=offered: browser.get("showing").is_displayed() is offered)
        assert not browser.get("show").is_selected() and browser.pixels()[0] == 0
        for dark, width in ((False, 360), (True, 1280)):
            browser.look(dark, width)
            browser.check_access()


@in_browser
def test_the_key_is_asked_for_and_kept_in_the_tab(qa, tmp_path, browser):
    from evoprune_serve.guard import Access

    with serving(qa, tmp_path, access=Access(key=KEY)) as server:
        browser.open(server.url)
        assert browser.get("access").is_displayed() and not browser.get("watch").is_displayed()
        browser.check_access()
        browser.get("key").send_keys("wrong", "\ue007")
        browser.until(lambda: browser.text("access-problem") == "That is not the key.")
        browser.get("key").send_keys("wr\u00f6ng \u043a\u043b\u044e\u0447", "\ue007")
        browser.until(lambda: browser.get("key").get_attribute("value") == "")
        assert browser.text("access-problem") == "That is not the key." and browser.text("model") == ""
        browser.get("key").send_keys(KEY, "\ue007")
        browser.until(browser.get("watch").is_displayed)
        browser.drop("square.mp4")
        assert browser.ask(COLOUR) == "green"
        browser.open(server.url)
        assert browser.get("watch").is_displayed()
        assert browser.driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
        assert not any(KEY in url for url in browser.requests)


@in_browser
def test_texts_are_never_markup(server, browser):
    """Names of files, questions and errors are never parsed as HTML."""
    browser.open(server.url)
    browser.drop("square.mp4", NO_PART_OF)
    assert browser.text("name") == NO_PART_OF
    browser.ask(NO_PART_OF)
    assert browser.all("#answers h3")[0].text == NO_PART_OF and not browser.all("main img:not(#picture)")
    browser.get("query").send_keys("<b>x</b>", "\ue007")
    browser.until(lambda: "<b>x</b>" in browser.text("find-state"))
    assert browser.driver.title.startswith("Ask a video")


@in_browser
def test_errors_are_told_and_the_page_goes_on(server, browser):
    browser.open(server.url)
    browser.drop("square.mp4")
    browser.get("show").click()
    browser.until(lambda: browser.get("overlay").get_attribute("aria-label").startswith("Frame pair"))
    for upload in list(server.state.uploads._uploads):
        server.state.uploads.delete(upload)
    assert browser.ask(COLOUR) == "green" and len(server.state.uploads._uploads) == 1  # it is uploaded again
    browser.get("another").click()
    broken = base64.b64encode(b"no video").decode()
    for name, has_player in (("broken.mp4", True), ("broken.HEIC", False)):
        browser.driver.execute_script(DROP, name, broken)
        browser.until(lambda: browser.text("video-problem") and browser.get("unplayable").is_displayed())
        assert not browser.get("picture").is_displayed()
        assert browser.get("transport").is_displayed() is has_player
        assert "The file" in browser.text("video-problem") and browser.text("name") == name
        browser.until(lambda: browser.text("ask-state") == "Choose another video.")
        assert not any(browser.get(each).is_enabled() for each in ("send", "search", "measure", "play"))
    browser.get("another").click()
    browser.drop("square.mp4")
    assert browser.ask(COLOUR) == "green" and not browser.text("video-problem")


@in_browser
def test_what_is_typed_while_an_answer_comes_stays(server, browser, monkeypatch):
    from evoprune_serve.work import begun

    going_on = threading.Event()

    def late(*given):
        going_on.wait(30)
        return begun(*given)

    monkeypatch.setattr("evoprune_serve.work.begun", late)
    browser.open(server.url)
    browser.drop("square.mp4")
    browser.get("question").send_keys(COLOUR, "\ue007")
    browser.until(browser.get("stop").is_displayed)
    browser.get("query").send_keys("a red")
    going_on.set()
    browser.until(lambda: browser.all("#answers details"))
    browser.driver.switch_to.active_element.send_keys(" star")
    assert browser.get("query").get_attribute("value") == "a red star"
    assert browser.get("question").get_attribute("value") == COLOUR


@in_browser
def test_a_reload_in_the_middle_of_an_answer_asks_first(server, browser, monkeypatch):
    from evoprune_serve.work import begun

    going_on = threading.Event()

    def late(*given):
        going_on.wait(30)
        return begun(*given)

    browser.open(server.url)
    browser.drop("square.mp4")
    assert browser.ask(COLOUR) == "green"
    leaves = "return !window.dispatchEvent(new Event('beforeunload', {cancelable: true}))"
    assert browser.driver.execute_script(leaves) is False
    monkeypatch.setattr("evoprune_serve.work.begun", late)
    browser.get("question").send_keys(COLOUR, "\ue007")
    browser.until(browser.get("stop").is_displayed)
    assert browser.driver.execute_script(leaves) is True
    going_on.set()


@in_browser
def test_of_several_files_the_others_are_named(server, browser):
    browser.open(server.url)
    several = DROP.replace("document.get", 'dataTransfer.items.add(new File([bytes], "second.mp4"));\ndocument.get')
    browser.driver.execute_script(several, "a.mp4", base64.b64encode((SAMPLES / "square.mp4").read_bytes()).decode())
    browser.until(browser.get("send").is_enabled)
    assert "second.mp4" in browser.text("video-note") and browser.text("name") == "a.mp4"


@in_browser
def test_a_clock_that_begins_late(server, browser, qa, tmp_path):
    """The page uses the model's times, which count from the first frame, and shows that frame."""
    clip = tmp_path / "late.mkv"
    with av.open(str(SAMPLES / "flash.mp4")) as source, av.open(str(clip), "w") as copied:
        stream = copied.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                packet.pts += int(5 / packet.time_base)
                packet.dts += int(5 / packet.time_base)
                copied.mux(packet)
    (right,) = qa.find(clip, "red diamond")
    browser.open(server.url)
    browser.drop(clip)
    browser.get("show").click()
    label = browser.get("overlay").get_attribute
    browser.until(lambda: label("aria-label").startswith("Frame pair 1 of"))
    assert browser.text("time").startswith("0:00.0")
    browser.get("query").send_keys("red diamond", "\ue007")
    (moment,) = browser.until(lambda: browser.all("#moments button"))
    moment.click()
    clock = "return document.getElementById('video').currentTime"
    browser.until(lambda: browser.driver.execute_script(clock) == pytest.approx(5 + right.start_s, abs=0.05))


@in_browser
def test_a_picture_is_shown_with_its_own_shares(server, browser, tmp_path):
    with av.open(str(SAMPLES / "square.mp4")) as file:
        next(file.decode(video=0)).to_image().save(tmp_path / "picture.png")
    browser.open(server.url)
    browser.drop(tmp_path / "picture.png")
    browser.get("show").click()
    browser.until(browser.get("picture").is_displayed)
    browser.until(lambda: browser.text("share") == "50% (balanced)")
    shares = [float(each.text.split("%")[0]) for each in browser.all("#ticks li")]
    assert shares == sorted(shares)
    assert not browser.get("transport").is_displayed() and not browser.get("search").is_enabled()
    assert not browser.get("unplayable").is_displayed()
    browser.until(lambda: browser.pixels()[0] > 0.9)
    assert browser.ask(COLOUR) == "green"
    browser.get("another").click()
    browser.drop("square.mp4")
    assert browser.text("share") == "25% (balanced)" and browser.get("transport").is_displayed()


@in_browser
def test_who_leaves_and_comes_back_goes_on(server, browser):
    browser.open(server.url)
    browser.drop("square.mp4")
    assert browser.ask(COLOUR) == "green"
    browser.driver.get("about:blank")
    browser.until(lambda: not server.state.uploads._uploads)
    browser.driver.back()
    browser.until(lambda: browser.get("watch").is_displayed())
    if browser.get("player").is_displayed():  # the browser has kept the page
        assert browser.ask(COLOUR) == "green" and len(server.state.uploads._uploads) == 1


@in_browser
def test_a_file_that_is_too_large_takes_nothing_away(qa, tmp_path, browser):
    from evoprune_serve.guard import Access

    sizes = {name: (SAMPLES / name).stat().st_size for name in ("square.mp4", "pan.mp4")}
    with serving(qa, tmp_path, access=Access(upload_bytes=sum(sizes.values()) // 2)) as server:
        browser.open(server.url)
        browser.drop(min(sizes, key=sizes.get))
        browser.ask(COLOUR)
        browser.drop(max(sizes, key=sizes.get))
        assert "is larger than" in browser.text("video-problem")
        assert len(browser.all("#answers article")) == 1 and len(server.state.uploads._uploads) == 1
