"""Whatever is wrong: the documented exit code, nothing on stdout, two lines on stderr, no traceback."""

import pytest

CLIP = "samples/square.mp4"
CASES = {
    "no command": ((), 2, "Usage"),
    "unknown command": (("what",), 2, "what"),
    "no video": (("ask",), 2, "video"),
    "unknown flag": (("ask", CLIP, "What?", "--fpss", "2"), 2, "--fpss"),
    "question not quoted": (("ask", CLIP, "What", "happens?"), 2, "quote the question"),
    "empty question": (("ask", CLIP, "  "), 2, "empty"),
    "budget zero": (("ask", CLIP, "What?", "-b", "0"), 2, "budget '0'"),
    "budget word": (("ask", CLIP, "What?", "-b", "tiny"), 2, "budget 'tiny'"),
    "budget nan": (("ask", CLIP, "What?", "-b", "nan"), 2, "budget 'nan'"),
    "unknown method": (("ask", CLIP, "What?", "--method", "magic"), 2, "magic"),
    "method argument without value": (("ask", CLIP, "What?", "--method-arg", "first"), 2, "NAME=VALUE"),
    "unknown method argument": (("ask", CLIP, "What?", "--method-arg", "speed=1"), 2, "speed"),
    "bad method argument": (("ask", CLIP, "What?", "--method-arg", "first=x"), 2, "first"),
    "impossible method argument": (("ask", CLIP, "What?", "--method-arg", "allocation=x"), 2, "allocation"),
    "fps and frames": (("ask", CLIP, "What?", "--fps", "1", "--frames", "2"), 2, "fps and frames"),
    "zero frames": (("ask", CLIP, "What?", "--frames", "0"), 2, "frames"),
    "negative fps": (("ask", CLIP, "What?", "--fps", "-1"), 2, "fps"),
    "bad time": (("ask", CLIP, "What?", "--start", "soon"), 2, "soon"),
    "no tokens allowed": (("ask", CLIP, "What?", "--max-visual-tokens", "0"), 2, "visual tokens"),
    "unknown decoder": (("ask", CLIP, "What?", "--decoder", "vlc"), 2, "vlc"),
    "empty further question": (("ask", CLIP, "What?", "-Q", ""), 2, "empty"),
    "video from stdin, and no question": (("ask", "-"), 2, "stdin"),
    "no new tokens": (("ask", CLIP, "What?", "-n", "0"), 2, "max_new_tokens"),
    "negative temperature": (("ask", CLIP, "What?", "-t", "-1"), 2, "temperature"),
    "unknown device": (("ask", CLIP, "What?", "--device", "abacus"), 2, "abacus"),
    "unknown dtype": (("ask", CLIP, "What?", "--dtype", "fp1"), 2, "fp1"),
    "missing video": (("ask", "no/such.mp4", "What?"), 3, "no/such.mp4"),
    "not a video": (("ask", "LICENSE", "What?"), 3, "LICENSE"),
    "a url": (("ask", "https://example.org/a.mp4", "What?"), 3, "download"),
    "start beyond the end": (("ask", CLIP, "What?", "--start", "1:00"), 3, "6 s"),
    "end before start": (("ask", CLIP, "What?", "--start", "3", "--end", "2"), 3, "start 3"),
    "no such model": (("ask", CLIP, "What?", "-m", "no/such model"), 4, "no/such model"),
    "folder without a model": (("ask", CLIP, "What?", "-m", "samples"), 4, "config.json"),
    "model not in the cache": (("ask", CLIP, "What?", "-m", "nobody/nothing", "--offline"), 4, "nobody/nothing"),
}


@pytest.mark.parametrize(("args", "code", "says"), CASES.values(), ids=CASES)
def test_error(cli, args, code, says):
    result = cli(*args)
    assert result.code == code, result.err
    assert result.out == ""
    assert says in result.err
    assert "Traceback" not in result.err
    if args:
        lines = result.err.splitlines()
        assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), result.err


def test_empty_file(cli, tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    result = cli("ask", path, "What?")
    assert (result.code, result.out) == (3, "") and "empty" in result.err


def test_control_characters_in_a_path_do_not_reach_the_terminal(cli):
    result = cli("ask", "no\x1b[31m\nsuch.mp4", "What?")
    assert result.code == 3 and "\x1b" not in result.err and len(result.err.splitlines()) == 2


@pytest.mark.parametrize(("args", "code"), [(("no/such.mp4", "What?"), 3), ((CLIP, "What?", "-b", "7"), 2)])
def test_json_error_is_a_line_too(cli, args, code):
    result = cli("ask", *args, "--json")
    assert result.code == code
    assert result.record["error"]["code"] == code and result.record["finish_reason"] == "error"
    assert result.record["answer"] is None and result.record["video"]["path"] == args[0]


def test_no_question_at_a_terminal_does_not_wait_for_one(cli):
    result = cli("ask", CLIP, terminal=True)
    assert result.code == 2 and "no question" in result.err


def test_no_question_and_empty_stdin(cli):
    assert cli("ask", CLIP, stdin="\n").code == 2


def test_debug_shows_the_traceback(cli):
    result = cli("ask", "no/such.mp4", "What?", "--debug")
    assert result.code == 3 and "Traceback" in result.err and "error: no such file" in result.err


def test_a_bug_is_reported_as_one(cli, monkeypatch):
    monkeypatch.setattr("evoprune_cli.ask._check_flags", lambda *_: 1 / 0)
    result = cli("ask", CLIP, "What?")
    assert result.code == 1 and "ZeroDivisionError" in result.err and "Traceback" not in result.err
