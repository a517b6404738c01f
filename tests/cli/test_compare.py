"""`evoprune ask --compare`: every question with and without pruning, whatever happens on the way."""

import json

import pytest

from evoprune.report import Report
from evoprune.session import encoding, prompting
from evoprune.session.answering import EncodedInputs

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
MORE = "Which way does the square move?"
ASK = ("ask", CLIP, QUESTION, "--compare")


def test_both_answers_on_stdout_and_both_sides_in_the_stats(cli):
    full = [cli("ask", CLIP, question, "-b", "full", "-q").out for question in (QUESTION, MORE)]
    fast = [cli("ask", CLIP, question, "-b", "fast", "-q").out for question in (QUESTION, MORE)]
    result = cli(*ASK, "-Q", MORE, "-b", "fast", "--stats")
    assert result.out == "".join(f"pruned: {a}full: {b}" for a, b in zip(fast, full, strict=True))
    rows = [line.split() for line in result.err.splitlines()]
    assert rows.count(["compare", "pruned", "full"]) == 2
    assert ["visual", "tokens", "14", "144", "10.3x"] in rows and sum(
        row[:2] == ["first", "token"] for row in rows
    ) == 4
    assert all(len(line) <= 80 for line in result.err.splitlines())
    assert cli(*ASK, "-q").err == ""


@pytest.mark.full
def test_one_json_line_a_question(cli):
    result = cli(*ASK, "-Q", MORE, "-b", "fast", "--json")
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["question"] for record in records] == [QUESTION, MORE] and result.err == ""
    for record in records:
        full = record["compare"]
        assert full["schema"] == record["schema"] and full["question"] == record["question"]
        assert (record["pruning"]["visual_tokens_kept"], full["pruning"]["visual_tokens_kept"]) == (14, 144)
        assert full["sampling"] == record["sampling"] and full["finish_reason"] == "stop"
        assert full["compare"] is None and full["id"] != record["id"]
        assert full["pruning"]["encoder_live_share"] == 1 > record["pruning"]["encoder_live_share"]
        assert full["time_ms"]["ttft_wall"] > 0
    assert records[1]["compare"]["time_ms"]["encode"] == 0  # encoded once on either side
    line = result.out.splitlines()[0]
    assert Report.from_json(line).to_json() == line
    assert cli("ask", CLIP, QUESTION, "--json").record["compare"] is None


@pytest.mark.full
@pytest.mark.parametrize("method", ["downscale", "subsample"])
def test_nothing_is_taken_away_on_the_full_side_by_methods_that_shrink_the_input(cli, method):
    full = cli(*ASK, "-b", "0.25", "--method", method, "--json").record["compare"]
    assert full["sampling"]["grid_thw"] == [6, 8, 12] and full["pruning"]["visual_tokens_kept"] == 144


@pytest.mark.full
@pytest.mark.parametrize("when", ["encode", "prefill"])
@pytest.mark.parametrize("problem", [MemoryError(), KeyboardInterrupt()])
def test_the_pruned_answer_stays_when_the_full_one_breaks_off(cli, monkeypatch, problem, when):
    def broken(*args, **settings):
        calls.append(1)
        if len(calls) == 2 or (len(calls) > 2 and when == "encode"):  # where memory is short, less is tried at a time
            raise problem.with_traceback(None)
        return real(*args, **settings)

    module, name = {"encode": (encoding, "encode_rows"), "prefill": (prompting, "prefill")}[when]
    real, interrupted = getattr(module, name), isinstance(problem, KeyboardInterrupt)
    reason, code = ("interrupt", 130) if interrupted else ("error", 5)
    for flags in (("-q",), ("--json",)):
        calls = []
        monkeypatch.setattr(module, name, broken)
        result = cli(*ASK, "-Q", MORE, *flags)
        monkeypatch.setattr(module, name, real)
        assert result.code == code
        if flags == ("-q",):
            assert result.out == "pruned: green\n"
            continue
        first, second = map(json.loads, result.out.splitlines())
        assert (first["answer"], first["finish_reason"], first["error"]) == ("green", "stop", None)
        assert first["compare"]["finish_reason"] == second["finish_reason"] == reason
        assert second["question"] == MORE and second["error"]["code"] == code
        if not interrupted:
            assert first["compare"]["error"]["stage"] == when


def test_an_interruption_of_the_second_question_is_not_taken_for_the_first(cli, monkeypatch):
    """The same question twice: the second has not begun when it ends."""

    def broken(self, question, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, question, **settings)

    calls, real = [], EncodedInputs.ask
    monkeypatch.setattr(EncodedInputs, "ask", broken)
    result = cli("ask", CLIP, QUESTION, "-Q", QUESTION, "--json")
    first, second = map(json.loads, result.out.splitlines())
    assert result.code == 130 and first["answer"] == "green" and second["answer"] is None
    assert first["id"] != second["id"] and second["error"]["type"] == "interrupted"
