"""`evoprune eval`: its output, formats and exit codes, and the inputs it refuses before it reads any weights."""

import csv
import io
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest

from evoprune.bench import eval as evaluation
from evoprune.bench.eval_results import EvalResults
from evoprune.bench.scores import COSTS, score_rows
from evoprune.errors import OutOfMemory
from evoprune.methods import Budget
from evoprune_cli.terminal import Terminated

ROOT = Path(__file__).parents[2]
DATA = "samples/questions.jsonl"


@pytest.fixture
def run(cli, tiny_folder):
    """`evoprune eval` on the tiny model and two of the sample clips, unless `args` say otherwise."""

    def call(*args, data=DATA, **settings):
        quick = ("-m", str(tiny_folder), "--limit", "2", "-b", "0.5", "--method", "random", "-n", "2", "--frames", "4")
        return cli("eval", "--data", str(data), *quick, *map(str, args), **settings)

    return call


@pytest.fixture
def choices(tmp_path):
    """A file with two multiple-choice questions about one clip."""
    row = {"video": str(ROOT / "samples/square.mp4"), "question": "What?", "options": ["one", "two"], "answer": "A"}
    path = tmp_path / "choices.jsonl"
    path.write_text("".join(json.dumps(row | {"id": i, "type": "t", "groups": ["g"]}) + "\n" for i in range(2)))
    return path


def breaking(monkeypatch, at: int, problem: BaseException):
    """Make the `at`-th encoding fail."""
    shown, real = [], evaluation.open_inputs

    def opened(*args, **more):
        if more["frames"] or more["tower"]:  # reading ahead does not count
            shown.append(args)
            if len(shown) == at:
                raise problem
        return real(*args, **more)

    monkeypatch.setattr(evaluation, "open_inputs", opened)


def table_rows(text: str, title: str = "accuracy") -> list[str]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(" ") and title in line) + 1
    below = lines[start : lines.index("", start)]
    return below[: next((i for i, line in enumerate(below) if line.startswith(("fewer than", "* "))), None)]


def _flat(result) -> str:
    return " ".join(result.out.split())


@pytest.mark.full
def test_rows_that_do_not_read_as_many_tokens_as_the_first_are_marked(cli, tiny_folder):
    how = ("-m", str(tiny_folder), "--limit", "1", "-b", "0.25", "-n", "1", "--frames", "4")
    names = "random,divprune,subsample,evs,fastv"  # evs keeps two of four frames
    out = cli("eval", "--data", DATA, *how, "--method", names).out
    rows = {line.split(" -b")[0]: line for line in table_rows(out, "vs random")[:4]}
    assert {name for name, line in rows.items() if "-b 0.25 * " in line} == {"subsample", "evs", "fastv"}
    footnote = "* reads a different number of tokens than random at this budget; see the table below"
    assert footnote in " ".join(out.split())
    assert footnote not in _flat(cli("eval", "--data", DATA, *how, "--method", "random,divprune"))


@pytest.mark.parametrize(
    ("groups", "where"),
    [
        ({"a": 29}, (None, "every group")),
        ({"a": 30}, ()),
        ({"a": 30, "b": 2}, ("b",)),
        ({"a": 30, "b": 2, "c": 29}, ("b, c",)),
    ],
)
def test_tables_of_few_questions_say_that_they_are_no_measurement(groups, where):
    costs = dict.fromkeys(COSTS, 1.0) | {"right": True, "unparseable": False, "type": None}
    one = costs | {"video": "a", "row": "full", "method": "none", "budget": 1.0}
    samples = [one | {"groups": [name]} for name, count in groups.items() for _ in range(count)]
    nothing = {"failures": [], "error": None, "notes": [], "settings": {"data": "x"}, "items": {"answered": 1}}
    videos, model = {"evaluated": 1, "wanted": 1, "failed": 0}, {"id": "m", "dtype": "fp32", "device": "cpu"}
    found = nothing | {"rows": score_rows(samples), "videos": videos, "model": model}
    made = EvalResults(found).table(80).splitlines()
    said = [f"fewer than 30 questions{f' in {each}' * bool(each)}: an example, not a measurement" for each in where]
    assert [line for line in made if "measurement" in line] == said


@pytest.mark.full
def test_a_chart_beside_results_that_are_not_there_yet(run, tmp_path):
    chart = tmp_path / "runs" / "a.svg"
    assert run("--blind", "-o", tmp_path / "runs" / "a", "--chart", chart).code == 0
    words = [e.text for e in ElementTree.parse(chart).iter() if e.tag.endswith("text")]
    assert {"By tokens", "By cost", "accuracy, %", "full", "blind", "random", "-b 0.5"} <= set(words)
    assert run("--chart", tmp_path / "gone" / "a.svg").code == 2
    assert "use a name that ends in .svg" in run("--chart", tmp_path / "a.png").err


def test_only_columns_that_are_there_are_explained(run):
    document = run("--json").record
    gone = 0
    for width in (80, 40, 30):
        made = EvalResults(document).table(width)
        heads, text = [line for line in made.splitlines() if line.startswith("   ")], " ".join(made.split())
        assert "accuracy in percent" in text and "TFLOP: operations" in text and "…" not in made
        for title in ("vs full", "kept", "live"):
            there = title in " ".join(heads)
            assert (f"{title}: " in text) == there, (width, title)
            gone += not there
    assert gone >= 3


def test_csv_has_a_line_a_row_and_group_with_the_values_of_json(run, choices):
    result = run("--format", "csv", data=choices)
    assert result.code == 0
    lines, record = list(csv.DictReader(io.StringIO(result.out))), run("--json", data=choices).record
    for line, row in zip(lines, record["rows"], strict=True):
        assert {name: line[name] for name in row} == {n: "" if v is None else str(v) for n, v in row.items()}
    assert {line["data"] for line in lines} == {str(choices)}
    assert {(line["model_id"], line["model_dtype"]) for line in lines} == {
        tuple(record["model"][n] for n in ("id", "dtype"))
    }
    assert all(note in result.err for note in record["notes"])  # stdout has only the lines
    assert run("--format", "csv", "-q", data=choices).err == ""


def test_a_format_is_one_of_two_and_not_given_beside_json(run):
    for given, says in ((("--format", "xml"), "one of table, csv"), (("--format", "csv", "--json"), "leave one out")):
        result = run(*given)
        assert (result.code, result.out.startswith("{")) == (2, "--json" in given) and says in result.err


def test_videos_that_failed_are_named_beside_csv(run, tmp_path):
    row = {"video": str(ROOT / "samples/square.mp4"), "question": "What?", "answer": "A"}
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(each) + "\n" for each in (row, row | {"video": str(tmp_path / "broken.mp4")})))
    result = run("--format", "csv", data=data)
    assert result.code == 6 and len(list(csv.DictReader(io.StringIO(result.out)))) == 2
    assert "failed: " in result.err and "broken.mp4" in result.err
    data.write_text(json.dumps(row | {"video": str(tmp_path / "broken.mp4")}) + "\n")
    result = run("--format", "csv", data=data)
    assert (result.code, result.out) == (6, "") and "broken.mp4" in result.err


def test_unparseable_answers_have_a_column(run, choices):
    result = run(data=choices)
    assert "unparsed: answers that name no option" in result.out
    assert all(row.split()[-1] == "2" for row in table_rows(result.out)), result.out
    rows = run("--json", data=choices).record["rows"]
    assert {row["unparseable"] for row in rows} == {2} and {row["accuracy"] for row in rows} == {0}
    assert {row["group"] for row in rows} == {"all", "g", "type:t"}


def test_a_folder_holds_it_all(run, tmp_path):
    place = tmp_path / "runs" / "first"
    result = run("-o", place, "--json")
    assert (result.code, result.err) == (0, "")
    assert sorted(path.name for path in place.iterdir()) == ["results.json", "samples.jsonl", "settings.json"]
    assert json.loads((place / "results.json").read_text()) == result.record
    lines = [json.loads(line) for line in (place / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 2 and {"question", "expected", "answer", "right"} <= lines[0].keys()
    again = run("-o", place)
    assert again.code == 0 and again.err == f"{place} already exists: writing to {place}-2\n"
    assert run("-o", place, "-q").err == ""


@pytest.mark.full
def test_a_chart_tells_twelve_methods_apart(run, tmp_path):
    names = "random,pool,divprune,mmr,dart,vidcom2,evs,scope,fastvid,prunevid,holitom,tome"
    run("--limit", "1", "--method", names, "--chart", tmp_path / "chart.svg")
    marks = [e.get("style") for e in ElementTree.parse(tmp_path / "chart.svg").iter() if e.tag.endswith("use")]
    assert len({style for style in marks if style.startswith("fill")}) >= 1 + 12  # and full


@pytest.mark.full
@pytest.mark.parametrize(
    ("problem", "code", "form"), [(KeyboardInterrupt(), 130, "table"), (Terminated(), 143, "json")]
)
def test_an_interruption_prints_what_there_is(run, tmp_path, monkeypatch, problem, code, form):
    breaking(monkeypatch, 4, problem)  # in the second video
    torn = run(*(["--json"] if form == "json" else []), "-o", tmp_path / "run")
    assert (torn.code, torn.err) == (code, f"to continue: evoprune eval --resume {tmp_path / 'run'}\n")
    if form == "json":
        assert torn.record["error"]["code"] == code and torn.record["videos"]["evaluated"] == 1
    else:
        assert "2 questions about 1 of 2 videos" in torn.out and "not all videos were evaluated" in torn.out


def test_a_folder_is_all_that_is_needed_to_go_on(run, cli, tmp_path, monkeypatch):
    place, more = tmp_path / "a run", ("-b", "fast,0.4", "--seed", "3", "--method", "evoprune:reuse=0,random")
    with monkeypatch.context() as patch:
        breaking(patch, 7, KeyboardInterrupt())  # in the second video
        torn = run(*more, "-o", place)
    assert torn.code == 130 and torn.err.endswith(f"to continue: evoprune eval --resume '{place}'\n")
    monkeypatch.setenv("EVOPRUNE_MODEL", "some/other")
    again = cli("eval", "--resume", place, "--json", "-q", "--threads", "1")
    assert (again.code, again.err) == (0, "")
    assert again.record["videos"] == {"wanted": 2, "evaluated": 2, "failed": 0}
    assert json.loads(json.dumps(again.record["settings"])) == json.loads((place / "settings.json").read_text())
    for given in ("-b", "--budget"):
        refused = cli("eval", "--resume", place, given, "0.1")
        assert refused.code == 2 and f"{given} cannot be used with --resume" in refused.err
    (place / "settings.json").write_text(json.dumps({"data": DATA}))
    assert f"{place} is not the folder of an evaluation" in cli("eval", "--resume", place).err
    assert "hint: give --data FILE, a JSONL or CSV file" in cli("eval", "-b", "0.5").err


@pytest.mark.parametrize("again", ["resume", "all"])
def test_a_run_goes_on_in_any_folder(cli, tmp_path, monkeypatch, tiny_folder, again):
    data = tmp_path / "of the run/questions.jsonl"
    data.parent.mkdir()
    rows = [{"id": str(n), "video": f"{n}.mp4", "question": "What?", "answer": "A square."} for n in range(2)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for row, name in zip(rows, ("square", "three"), strict=True):
        shutil.copy(f"samples/{name}.mp4", data.parent / row["video"])
    (data.parent / "model").symlink_to(tiny_folder.resolve())
    quick = ("-b", "0.5", "--frames", "4", "-n", "2", "-q")
    monkeypatch.chdir(data.parent)
    with monkeypatch.context() as patch:
        breaking(patch, 3, KeyboardInterrupt())  # in the second video
        assert cli("eval", "--data", data.name, "-m", "model", "-o", "runs/a", *quick).code == 130
    monkeypatch.chdir(tmp_path)
    given = ("--data", data, "-m", data.parent / "model", *quick) if again == "all" else ()
    result = cli("eval", "--resume", "of the run/runs/a", "--json", *given)
    assert result.code == 0 and result.record["videos"] == {"wanted": 2, "evaluated": 2, "failed": 0}
    data.write_text(data.read_text().replace("What?", "Who?"))
    refused = cli("eval", "--resume", "of the run/runs/a", *given)
    assert refused.code == 2 and "other settings: digest was" in refused.err


@pytest.mark.parametrize("form", ["table", "json"])
def test_an_interruption_before_the_first_video(run, monkeypatch, form):
    breaking(monkeypatch, 1, KeyboardInterrupt())
    result = run(*(["--json"] if form == "json" else []))
    assert (result.code, result.err) == (130, "")
    assert result.record["rows"] == [] if form == "json" else result.out == ""


def test_a_failed_video(run, tmp_path, monkeypatch):
    rows = [{"video": name, "question": "What?", "answer": "x"} for name in ("gone.mp4", "square.mp4")]
    (tmp_path / "square.mp4").write_bytes((ROOT / "samples/square.mp4").read_bytes())
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run(data=tmp_path / "q.jsonl")
    assert (result.code, result.err) == (6, "")
    assert "1 question about 1 of 2 videos, 1 failed" in _flat(result) and "failed: gone.mp4: no" in result.out
    breaking(monkeypatch, 2, OutOfMemory("out of memory in encode", stage="encode"))
    result = run("--json", "--limit", "1")
    assert result.code == 6 and result.record["rows"] == [] and result.record["videos"]["failed"] == 1
    assert result.record["failures"][0]["message"] == "out of memory in encode"


def test_nothing_but_failures_is_still_a_table(run, tmp_path):
    (tmp_path / "q.jsonl").write_text(
        '{"video": "gr\u00fcn.mp4", "question": "What?", "answer": "x"}\n', encoding="utf-8"
    )
    result = run(data=tmp_path / "q.jsonl", encoding="ascii")
    assert result.code == 6 and result.out.isascii() and "0 questions about 0 of 1 video, 1 failed" in _flat(result)


def test_answers_that_are_cut_short_are_counted(cli):
    some = ("eval", "--data", DATA, "--limit", "1", "-b", "0.25")
    assert "incomplete" not in cli(*some).out
    assert "of 4 answers may be incomplete: token limit reached (-n, max_new_tokens)" in _flat(cli(*some, "-n", "1"))


def test_only_questions_of_a_group(run, choices):
    text = choices.read_text().splitlines()
    choices.write_text(text[0] + "\n" + text[1].replace('["g"]', '["h"]') + "\n")
    record = run("--group", "h", "--json", data=choices).record
    assert record["items"]["answered"] == 1 and {row["group"] for row in record["rows"]} == {"all", "h", "type:t"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--group", "sound"), "no question is in the group sound"),
        (("--limit", "0"), "--limit"),
        (("--seed", "-1"), "--seed"),
        (("-o", "a", "--resume", "b"), "cannot be combined"),
        *((("-o", name), f"-o '{name}' does not name a new folder") for name in ("", ".", "..", "/")),
        (("-o", "README.md/a/b"), "cannot write README.md/a/b"),
        (("--resume", ""), "not the folder of an evaluation"),
        (("--resume", "samples"), "samples is not the folder of an evaluation"),
        (("--chart", "no/such/file.svg"), "cannot write no/such/file.svg"),
        (("--tables",), "see evoprune eval --help"),
    ],
)
def test_wrong_flags(run, monkeypatch, args, says):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    result = run(*args, "--json")
    error, hint = result.err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ") and says in result.err
    assert result.code == 2 == result.record["error"]["code"] and result.record["schema"] == "evoprune/eval@1"


def test_defaults(cli, monkeypatch):
    made = []

    class Enough(Exception):
        pass

    def begin(settings, videos):
        made.append((settings, videos))
        raise KeyboardInterrupt

    monkeypatch.setattr("evoprune.bench.Evaluation", begin)
    monkeypatch.setattr("evoprune.session.describe", lambda options: None)
    monkeypatch.setenv("EVOPRUNE_BUDGET", "fast")
    monkeypatch.setenv("EVOPRUNE_MODEL", "some/model")
    assert cli("eval", "--data", DATA).code == 130
    monkeypatch.delenv("EVOPRUNE_BUDGET")
    monkeypatch.delenv("EVOPRUNE_MODEL")
    assert cli("eval", "--data", DATA).code == 130
    (set_by, _), (plain, videos) = made
    assert set_by.budgets == ("fast",) and (set_by.model.model, plain.model.model) == ("some/model", "demo")
    assert (plain.budgets, plain.methods) == (tuple(Budget.PRESETS)[1:], ("evoprune",))
    assert (plain.seed, plain.limit, plain.blind, plain.generation.max_new_tokens) == (0, None, False, 64)
    assert len(videos) == 6 and len(plain.digest) == 64
