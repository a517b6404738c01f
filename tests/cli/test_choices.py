"""`--choices` of the commands that answer, and `eval --score likelihood`."""

import json
from pathlib import Path

import pytest

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
ROWS = [
    {"question": QUESTION, "options": ["red", "green", "blue"], "answer": "green"},
    {"question": "What shape is it?", "options": ["A. circle", "B. square"], "answer": "B"},
]


def rows(folder, *more):
    path = folder / "rows.jsonl"
    lines = [{"id": str(n), "video": str(Path(CLIP).resolve())} | row for n, row in enumerate([*ROWS, *more])]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_ask_chooses(cli):
    asked = ("ask", CLIP, QUESTION, "--frames", "4", "--choices", "red,green", "--choices", "blue")
    said = cli(*asked)
    assert said.out == "green\n" and "choices    green " in said.err
    later = cli("ask", CLIP, "-Q", "What shape is it?", "-Q", QUESTION, "--frames", "4", "--choices", "red,green")
    assert "ms; choices green " in later.err
    record = cli(*asked, "--json", "--choice-score", "mean").record
    assert [each["text"] for each in record["choices"]] == ["red", "green", "blue"] and record["answer"] == "green"
    for given, wrong in (
        ("red", "--choices is 'red', which is only one text"),
        ("red,", "--choices is 'red', which is only one text"),
        ("red,green,red", "--choices is 'red,green,red', with 'red' twice"),
        ("options", "works only in a batch"),
        ("a,\udcff", "not valid text"),
    ):
        refused = cli("ask", CLIP, QUESTION, "-m", "nobody/nothing", "--choices", given)
        assert refused.code == 2 and wrong in refused.err


def test_a_batch_chooses_among_the_options_of_rows(cli, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = ("batch", "-m", "demo", "--frames", "4", "--choices", "options", "-q", "-o", str(out), "--from")
    assert cli(*asked, rows(tmp_path)).code == 0
    first, second = map(json.loads, out.read_text().splitlines())
    assert (first["answer"], first["question"]) == ("green", QUESTION)  # no letters
    assert [each["text"] for each in second["choices"]] == ["circle", "square"]
    assert cli(*asked, rows(tmp_path), "--resume").code == 0 and len(out.read_text().splitlines()) == 2
    refused = cli(*asked, rows(tmp_path, {"question": QUESTION}), "--overwrite")
    assert refused.code == 2 and "row 2 has no options" in refused.err
    refused = cli(*asked, rows(tmp_path, {"question": QUESTION, "options": ["red", "red"]}), "--overwrite")
    assert refused.code == 2 and "row 2 has an option twice: red, red" in refused.err
    refused = cli(*asked[:-1], CLIP, "-Q", QUESTION, "--overwrite")
    assert refused.code == 2 and "give --from FILE" in refused.err


@pytest.mark.full
def test_eval_grades_by_likelihood(cli, tmp_path):
    asked = ("eval", "--data", rows(tmp_path, {"question": QUESTION, "answer": "green"}), "--frames", "4", "-b", "0.25")
    done = cli(*asked, "--score", "likelihood", "-q", "-o", str(tmp_path / "run"))
    assert done.code == 0 and "Brier" in done.out
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [len(each["choices"] or ()) for each in samples] == [3, 2, 0] * 2
    assert all(each["answer"] in [choice["text"] for choice in each["choices"]] for each in samples if each["choices"])
    record = cli(*asked, "--score", "likelihood", "--json", "-q").record
    assert record["settings"]["score"] == "likelihood"
    assert all(0 <= row["brier"] <= 2 for row in record["rows"])
    plain = cli(*asked, "--json", "-q").record
    assert {row["brier"] for row in plain["rows"]} == {None}
    refused = cli(*asked, "--score", "chance")
    assert refused.code == 2 and "text or likelihood" in refused.err
    refused = cli("eval", "--data", "samples/questions.jsonl", "--score", "likelihood")
    assert refused.code == 2 and "no question has any" in refused.err
