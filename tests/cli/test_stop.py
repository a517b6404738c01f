"""`--stop` and `--logprobs` of the commands that answer."""

import json

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


def test_ask_has_both(cli):
    asked = ("ask", CLIP, QUESTION, "--frames", "4", "--stop", "ee", "--stop", "zz")
    assert cli(*asked, "-q").out == "gr\n"
    record = cli(*asked, "--logprobs", "1", "--json").record
    assert (record["answer"], record["stop_reason"]) == ("gr", "ee")
    assert len(record["logprobs"]) == record["tokens"]["new"]
    refused = cli(*asked, "--logprobs", "1")
    assert refused.code == 2 and "add --json" in refused.err
    refused = cli("ask", CLIP, QUESTION, "--stop", "")
    assert refused.code == 2 and "stop is an empty text" in refused.err


def test_a_comparison_reads_the_whole_answer_along(cli):
    record = cli("ask", CLIP, QUESTION, "--frames", "4", "--stop", "ee", "--compare", "--json").record
    assert record["compare"]["answer"] == "gr"
    assert record["agreement"]["tokens"] == record["compare"]["tokens"]["new"]  # without an end-of-sequence token


def test_a_batch_has_both_and_can_be_resumed(cli, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = (
        "batch",
        CLIP,
        "-Q",
        QUESTION,
        "-m",
        "demo",
        "--frames",
        "4",
        "--stop",
        "ee",
        "--logprobs",
        "0",
        "-q",
        "-o",
        str(out),
    )
    assert cli(*asked).code == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert (record["answer"], record["batch"]["settings"]["stop"], len(record["logprobs"])) == (
        "gr",
        ["ee"],
        record["tokens"]["new"],
    )
    assert cli(*asked, "--resume").code == 0 and len(out.read_text().splitlines()) == 1
    other = cli(*asked, "--resume", "--stop", "zz")
    assert other.code == 2 and "stop was" in other.err
    refused = cli(*asked[:-1], str(tmp_path / "out.csv"))
    assert refused.code == 2 and "table" in refused.err
