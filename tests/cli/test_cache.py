"""`ask --cache` and what `inspect` says of it."""

import json

import pytest

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
ASK = ("ask", CLIP, QUESTION)


@pytest.fixture(autouse=True)
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_off_unless_asked_for(cli, folder):
    assert cli(*ASK, "--json").record["cache"] == "off" and not folder.exists()
    assert cli(*ASK, "--json", "--no-cache").record["cache"] == "off" and not folder.exists()


def test_the_second_time_it_comes_from_the_cache(cli):
    first, second = (cli(*ASK, "--cache", "--json").record for _ in range(2))
    assert (first["cache"], second["cache"]) == ("miss", "hit") and first["answer"] == second["answer"]
    assert first["pruning"] == second["pruning"] and second["time_ms"]["encode"] == 0
    result = cli(*ASK, "--cache")
    assert result.out == "green\n" and "36 visual tokens from the cache" in result.err and "\nencode" not in result.err


@pytest.mark.full
def test_both_sides_of_a_comparison(cli):
    records = [cli(*ASK, "--cache", "--compare", "--json").record for _ in range(2)]
    assert [(r["cache"], r["compare"]["cache"]) for r in records] == [("miss", "miss"), ("hit", "hit")]


@pytest.mark.full
def test_a_method_that_reads_the_question_is_not_cached_but_encodes_once(cli, folder):
    questions = ("-Q", QUESTION, "-Q", "Does anything move?")
    for _ in range(2):
        result = cli("ask", CLIP, *questions, "--cache", "--json", "--method", "cdpruner", "-b", "0.25")
        first, second = map(json.loads, result.out.splitlines())
        assert first["cache"] == second["cache"] == "off" and not folder.exists()
        assert first["pruning"]["visual_tokens_kept"] == second["pruning"]["visual_tokens_kept"] == 36
        assert second["time_ms"]["read"] == 0 < second["time_ms"]["encode"]


@pytest.mark.full
def test_from_stdin(cli):
    with open(CLIP, "rb") as file:
        content = file.read()
    states = [cli("ask", "-", QUESTION, "--cache", "--json", stdin=content).record["cache"] for _ in range(2)]
    assert states == ["miss", "hit"]


@pytest.mark.full
def test_a_folder_that_cannot_be_written(cli, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", "LICENSE/cache")
    result = cli(*ASK, "--cache", "-q")
    assert (result.code, result.out) == (0, "green\n") and result.err.startswith("warning: the encoded video could not")
    assert cli(*ASK, "--cache", "--json").record["warnings"] == ["cache_not_written"]


def test_inspect_shows_and_empties_it(cli, folder, monkeypatch):
    cli(*ASK, "--cache", "-q")
    facts = cli("inspect", "--json").record["cache"]
    (entry,) = folder.iterdir()
    assert facts == {
        "folder": str(folder),
        "videos": 1,
        "size_bytes": entry.stat().st_size,
        "limit_bytes": 2 * 2**30,
        "quantized_models": 0,
        "quantized_bytes": 0,
    }
    assert "limit               2.0 GiB" in cli("inspect").out
    assert cli("inspect", "--clear-cache", "--json").record["cache"]["videos"] == 0 and list(folder.iterdir()) == []
    result = cli("inspect", CLIP, "--clear-cache")
    assert result.code == 2 and "--clear-cache is not about a video" in result.err

    def refused(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("evoprune.session.cache.Cache.clear", refused)
    result = cli("inspect", "--clear-cache")
    assert result.code == 2 and "Permission denied" in result.err and len(result.err.splitlines()) == 2
