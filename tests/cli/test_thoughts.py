"""--think and --show-thoughts: stdout has only the answer; thoughts go to stderr if requested."""

import json
from pathlib import Path

import pytest

from tests.cli.screen import visible
from tests.thinking import THINKING, Saying, thinking_tokenizer
from tests.tiny import save_tiny

CLIP, QUESTION = "samples/square.mp4", "What happens?"
SAID = "It turns to the left, I would say.\n</think>\n\nIt turns left."
QUICK = ("--frames", "2", "--no-stats")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = save_tiny(tmp_path_factory.mktemp("thinks"))
    (made / "chat_template.jinja").write_text(THINKING["unless off"])
    return made


@pytest.fixture
def says(monkeypatch):
    """Make the model say a text."""

    def what(text: str) -> None:
        tokenizer = thinking_tokenizer(special=None)
        monkeypatch.setattr("evoprune.language.answer.TokenStream", lambda *given: Saying(tokenizer, text)(*given))

    return what


@pytest.mark.parametrize("columns", [None, 40])
def test_the_answer_is_alone_on_stdout(cli, folder, says, columns):
    says(SAID)
    for show, shown in (((), False), (("--show-thoughts",), True)):
        done = cli("ask", CLIP, QUESTION, "-m", folder, "--think", "on", *QUICK, *show, columns=columns)
        assert done.code == 0 and done.out == "It turns left.\n"
        assert (
            "I would say." in " ".join("\n".join(visible(done.err)).split() if columns else done.err.split())
        ) is shown
        assert "</think>" not in done.err and "answer" not in done.err
    if not columns:
        assert "It turns to the left, I would say.\n" in done.err


def test_a_record_has_both(cli, folder, says):
    says(SAID)
    asked = ("ask", CLIP, "-Q", QUESTION, "-Q", "Why?", "-m", folder, "--json", *QUICK)
    done = [json.loads(line) for line in cli(*asked, "--think", "on").out.splitlines()]
    assert [(each["answer"], each["thoughts"]) for each in done] == [
        ("It turns left.", "It turns to the left, I would say.")
    ] * 2
    says("It turns left.")
    done = [json.loads(line) for line in cli(*asked).out.splitlines()]
    assert [(each["answer"], each["thoughts"]) for each in done] == [("It turns left.", None)] * 2


def test_an_answer_that_is_cut_inside_thoughts_says_so(cli, folder, says):
    says(SAID)
    done = cli("ask", CLIP, QUESTION, "-m", folder, "--think", "on", "-n", "3", *QUICK)
    assert (
        done.out == "\n"
        and "still thinking when it reached the token limit, -n" in done.err
        and "may be incomplete" not in done.err
    )


def test_a_model_that_cannot_is_refused_before_it_encodes(cli, monkeypatch):
    monkeypatch.setattr("evoprune.session.encoding.OpenInputs.encode", lambda *_: pytest.fail("it was encoded"))
    done = cli("ask", CLIP, QUESTION, "--think", "on")
    assert done.code == 2 and "does not support thinking" in done.err and "hint: leave out --think" in done.err


def test_a_model_that_always_thinks_says_so_once(cli, folder, says, tmp_path):
    always = save_tiny(tmp_path)
    (always / "chat_template.jinja").write_text(THINKING["always"])
    says(SAID)
    done = cli("ask", CLIP, "-Q", QUESTION, "-Q", "Why?", "-m", always, *QUICK)
    assert done.out == "It turns left.\n" * 2 and done.err.count("always thinks before it answers") == 1


def test_batches_and_evaluations_grade_and_keep_answers_alone(cli, folder, says, tmp_path):
    says(SAID)
    row = {"video": str(Path(CLIP).resolve()), "question": QUESTION, "id": "1", "answer": "It turns left."}
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(row))
    how = ("-m", folder, "--frames", "2", "--think", "on", "-q")
    assert cli("batch", "--from", rows, "-o", tmp_path / "out.jsonl", *how).code == 0
    record = json.loads((tmp_path / "out.jsonl").read_text())
    assert (record["answer"], record["thoughts"]) == ("It turns left.", "It turns to the left, I would say.")
    assert record["batch"]["settings"]["think"] == "on"
    assert cli("eval", "--data", rows, "-b", "0.5", "-o", tmp_path / "results", *how).code == 0
    samples = [json.loads(line) for line in (tmp_path / "results" / "samples.jsonl").read_text().splitlines()]
    assert samples and all(each["right"] and each["thoughts"] == record["thoughts"] for each in samples)


def test_watch_answers_alike(cli, folder, says):
    says(SAID)
    done = cli("watch", CLIP, "-Q", QUESTION, "-m", folder, "--think", "on", "--show-thoughts", "--no-stats")
    assert done.out == "It turns left.\n" and "I would say." in done.err
