"""`--schema` and `--regex` of the commands that answer."""

import json

import pytest

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
SHOWN = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}},
    "required": ["colour"],
    "additionalProperties": False,
}


@pytest.fixture
def schema(tmp_path):
    file = tmp_path / "shown.json"
    file.write_text(json.dumps(SHOWN))
    return str(file)


def test_ask_follows_a_schema(cli, schema):
    said = json.loads(cli("ask", CLIP, QUESTION, "--frames", "4", "--schema", schema, "-q").out)
    assert said["colour"] in ("red", "green")
    record = cli("ask", CLIP, QUESTION, "--frames", "4", "--schema", schema, "--json", "--compare").record
    assert record["parsed"] == said and record["compare"]["parsed"] == json.loads(record["compare"]["answer"])
    assert record["agreement"]["tokens"] == record["compare"]["tokens"]["new"]
    assert record["generation"]["schema"] == SHOWN


def test_the_demo_says_once_that_it_cannot_write_json(cli, schema):
    said = cli("ask", CLIP, "-Q", "Answer as JSON, please.", "-Q", QUESTION, "--frames", "4", "--schema", schema, "-q")
    (warning,) = said.err.splitlines()
    assert warning.startswith("warning: the demo models were not trained to write JSON")
    assert all(json.loads(line)["colour"] in ("red", "green") for line in said.out.splitlines())
    record = cli("ask", CLIP, QUESTION, "--frames", "4", "--schema", schema, "--json").record
    assert record["warnings"] == ["demo_schema"]
    assert "demo_schema" not in cli("ask", CLIP, QUESTION, "--frames", "4", "--regex", "red|green", "--json").out


def test_ask_follows_a_regular_expression(cli):
    said = cli("ask", CLIP, QUESTION, "--frames", "4", "--regex", "a (green|red) square", "-q").out
    assert said in ("a green square\n", "a red square\n")


def test_a_batch_follows_it_and_can_be_resumed(cli, schema, tmp_path):
    out = tmp_path / "out.jsonl"
    asked = ("batch", CLIP, "-Q", QUESTION, "-m", "demo", "--frames", "4", "-q", "-o", str(out))
    assert cli(*asked, "--schema", schema).code == 0
    (record,) = map(json.loads, out.read_text().splitlines())
    assert record["parsed"] == json.loads(record["answer"]) and record["batch"]["settings"]["schema"] == SHOWN
    assert cli(*asked, "--schema", schema, "--resume").code == 0 and len(out.read_text().splitlines()) == 1
    other = cli(*asked, "--resume")
    assert other.code == 2 and "schema was" in other.err


def test_a_bad_schema_is_refused_before_a_model_is_loaded(cli, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text('{"properties": {"a": {"not": {}}}}')
    asked = ("ask", CLIP, QUESTION, "-m", "no/such/model")
    for option, said in (
        (("--schema", str(file)), "cannot be used at /properties/a"),
        (("--schema", "gone.json"), "no such file: gone.json"),
        (("--regex", "("), "unclosed group"),
        (("--regex", "a", "--schema", str(file)), "--schema and --regex cannot be combined"),
    ):
        refused = cli(*asked, *option)
        assert refused.code == 2 and said in refused.err
