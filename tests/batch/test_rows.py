"""Test how the rows of a batch are read from files and from the command line, and how they are grouped."""

import io
import json
import re
import warnings
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.batch.rows import (
    FIELDS,
    NAMES,
    SETTINGS,
    Problems,
    Row,
    RowReader,
    Span,
    in_folders,
    left_out,
)
from evoprune.errors import EvopruneWarning, UsageError
from evoprune.language import GenerationOptions, Turn
from evoprune.video import SamplingOptions

ROW = {"video": "a.mp4", "question": "What?"}
SAID = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "A man."},
    {"role": "user", "content": "What?"},
]
TALK = {"video": "a.mp4", "messages": SAID}


def jsonl(*rows) -> bytes:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()


def read(content: bytes, **span) -> list[Row]:
    return RowReader(sampling=SamplingOptions(**span)).read(io.BytesIO(content), "rows", "there")


def test_json_lines(tmp_path):
    rows = [ROW, "", ROW | {"id": 7, "start": "1:30", "end": 99.5, "type": "order", "answer": 3}]
    rows.append(ROW | {"id": "x", "question": "Which?\u2028", "options": ["red", "blue"], "start": None})
    (tmp_path / "q.jsonl").write_bytes(jsonl(*rows))
    first, second, third = RowReader().load(str(tmp_path / "q.jsonl"))
    assert (first.inputs, first.paths, first.prompt) == (("a.mp4",), (str(tmp_path / "a.mp4"),), "What?")
    assert (second.id, second.start_s, second.end_s, second.answer) == ("7", 90.0, 99.5, 3)
    assert (third.id, third.start_s, third.end_s, third.options) == ("x", 0.0, None, ("red", "blue"))
    assert (
        third.prompt
        == "Which?\u2028\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    )


@pytest.mark.parametrize("before", ["\n", "\r\n\r\n", "\ufeff\n"])
def test_empty_lines_before_the_header_of_a_table(before):
    (row,) = RowReader(numbered=True).read(
        io.BytesIO(f"{before}video;question\nsamples/square.mp4;What?".encode()), "rows"
    )
    assert row.id == str(2 + before.count("\n")) and row.question == "What?"


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("head", ["", "\ufeff"])
def test_csv(delimiter, head):
    lines = [["id", "video", "question", "start", "options"], ["7", "/a b.mp4", '"What,; \tnow?\nthen?"', "1:30", ""]]
    lines.append(["", "b.mp4", "Which?", "", "red| blue"])
    first, second = read((head + "".join(delimiter.join(line) + "\r\n" for line in lines)).encode())
    assert (first.id, first.paths, first.question) == ("7", ("/a b.mp4",), "What,; \tnow?\nthen?")
    assert (first.start_s, first.options, second.options, second.start_s) == (90.0, (), ("red", "blue"), 0.0)
    assert second.paths == ("there/b.mp4",) and second.id != first.id


@pytest.mark.parametrize(
    ("given", "options"),
    [
        *((f"{a}red|{b}A. one", ("red", "A. one")) for a, b in (("A. ", "B. "), ("(A) ", "(B) "), (" a:", " b . "))),
        *((text, tuple(text.split("|"))) for text in ("A. red|blue", "C: drive|D: drive", "A|B", "A cat|B movie", "A.|B.")),
    ],
)  # fmt: skip
def test_options_that_have_their_letters_get_no_others(given, options):
    assert read(jsonl(ROW | {"options": given.split("|")}))[0].options == options


texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)
fields = st.fixed_dictionaries(
    {"video": texts, "question": texts},
    optional={"id": texts | st.integers(), "start": st.floats(0, 9), "end": st.floats(10, 1e6), "answer": texts},
)


@settings(deadline=None)
@given(st.lists(fields, min_size=1))
def test_what_a_row_says_is_what_is_asked(rows):
    names = [str(row["id"]) if "id" in row else None for row in rows]
    try:
        made = read(jsonl(*rows))
    except UsageError as problem:
        assert "same id" in problem.message
        questions = [json.dumps({k: v for k, v in row.items() if k != "answer"}, sort_keys=True) for row in rows]
        assert len(set(names) - {None}) < len([n for n in names if n]) or len(set(questions)) < len(questions)
        return
    assert len({row.id for row in made}) == len(rows)
    for row, given_, name in zip(made, rows, names, strict=True):
        assert (row.video, row.question) == (given_["video"], given_["question"]) and name in (None, row.id)
        assert (row.start_s, row.end_s) == (given_.get("start", 0), given_.get("end"))


OTHER_VALUES = dict.fromkeys(NAMES.values(), 2) | {
    "video": "b.mp4", "inputs": ["a.mp4", "b.mp4"], "question": "Who?", "options": ["red", "blue"], "subtitles": "a.srt",
    "messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}],
}  # fmt: skip


def test_a_row_sets_options_and_always_its_span():
    for name, (setting, default) in SETTINGS.items():
        assert getattr(setting.options(), name) == default or not setting.recorded
    assert {*SamplingOptions.SPAN} <= {*SETTINGS}, "SPAN contains an option that isn't a setting of Row"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_reaches_its_options_and_separates_encodings(name):
    value = OTHER_VALUES[NAMES[name]]
    usual, row = read(jsonl(ROW | {"id": "a"}, ROW | {"id": "b", NAMES[name]: value}))
    if name == "subtitles":
        value = row.subtitles_path
    if SETTINGS[name][0].options is GenerationOptions:
        assert getattr(row.generation(GenerationOptions()), name) == value
        assert usual.generation(GenerationOptions()) == GenerationOptions() and len(Span.group([usual, row])) == 1
    else:
        assert getattr(SamplingOptions().with_overrides(**row.sampling), name) == value
        assert SamplingOptions().with_overrides(**usual.sampling) == SamplingOptions()
        assert len(Span.group([usual, row])) == 2


@pytest.mark.parametrize("name", SamplingOptions.SPAN)
def test_the_span_of_the_batch_applies_to_rows_without_their_own(name):
    reader = RowReader(sampling=SamplingOptions(**{name: 3}))
    rows = reader.read(io.BytesIO(jsonl(ROW | {"id": "a"}, ROW | {"id": "b", NAMES[name]: 2})), "rows")
    assert [getattr(row, name) for row in rows] == [3.0, 2.0]


def test_hints_and_documents_list_every_setting():
    root = Path(__file__).parent.parent.parent
    with pytest.raises(UsageError) as caught:
        read(jsonl({}))
    records = (root / "docs/json.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^A line may also have .*", (root / "docs/guide.md").read_text(encoding="utf-8"), re.M)
    for name in SETTINGS:
        assert NAMES[name] in caught.value.hint.replace(",", "").split()
        assert f"`batch.row.{name}`" in records
        assert f"`{NAMES[name]}`" in line or name == "subtitles"


def test_every_field_that_changes_an_answer_is_part_of_what_is_asked():
    assert {*OTHER_VALUES} == {*FIELDS} - {"id", "answer", "type", "groups"}
    (usual,) = read(jsonl(ROW))
    for name, value in OTHER_VALUES.items():
        row = {key: each for key, each in ROW.items() if (key, name) != ("video", "inputs")} | {name: value}
        if name == "messages":
            row = row | {name: [*value, {"role": "user", "content": row.pop("question")}]}
        (other,) = read(jsonl(row))
        assert other.asked != usual.asked, name


def test_an_id_is_made_of_what_is_asked_and_of_nothing_else():
    def name(**other):
        return read(jsonl(ROW | other))[0].id

    (pair,) = RowReader().pairs(["a.mp4"], ["What?"])
    assert name() == name(answer="yes") == name(type="order") == name(start=0) == pair.id
    others = {"video": "b.mp4", "question": "Who?", "start": 1, "end": 1, "options": ["a", "b"], "subtitles": "a.srt"}
    assert len({name(), *(name(**{field: value}) for field, value in others.items())}) == 7
    assert [row.id for row in read(jsonl(ROW | {"question": "Who?"}, ROW))][1] == name()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "rows, line 2: "),
        ("[]", "not a JSON object"),
        ({"video": "a.mp4"}, "no question"),
        ({"question": "What?"}, "no video"),
        (ROW | {"question": " "}, "question is empty"),
        (ROW | {"question": "\ud800"}, "question is not valid text"),
        (ROW | {"question": "a\0b"}, "question is not valid text"),
        (ROW | {"video": 3}, "video is not text"),
        (ROW | {"options": "yes"}, "options is not a list"),
        (ROW | {"options": ["yes"]}, "2 to 26"),
        (ROW | {"options": ["yes", 3]}, "option is not text"),
        (ROW | {"start": "soon"}, "'soon' is not a time"),
        (ROW | {"start": True}, "start is not a time"),
        (ROW | {"start": -1, "end": -2}, "end -2 s is not after start -1 s"),
        (ROW | {"end": float("nan")}, "line 2: NaN is not a valid JSON number"),
        (ROW | {"start": 3, "end": 3}, "end 3 s is not after start 3 s"),
        (ROW | {"id": 1.5}, "id is neither"),
        (ROW | {"id": ""}, "id is neither"),
        (ROW | {"id": True}, "id is neither"),
        (ROW | {"id": 1}, r"same id \(or same question\) as rows, line 1"),
        (ROW | {"options": ["B. blue", "A. red"]}, "the options have the letters B, A"),
        ({"inputs": [], "question": "Which?"}, "not a list of paths"),
        ({"inputs": "a.mp4", "question": "Which?"}, "not a list"),
        ({"inputs": [" "], "question": "Which?"}, "input is empty"),
        (ROW | {"inputs": ["b.mp4"]}, "cannot be combined"),
        (ROW | {"start": 1, "video_start": 1}, "start and video_start cannot be combined"),
        (ROW | {"fps": 2, "nframes": 8}, "fps and frames cannot be combined"),
        (ROW | {"fps": 0}, "fps is 0"),
        (ROW | {"fps": "fast"}, "fps is not a number"),
        (ROW | {"frames": 2.5}, "frames is not a whole number"),
        (ROW | {"frames": True}, "frames is True, not a whole number"),
        (ROW | {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (ROW | {"messages": [{"role": "user", "content": "What?"}]}, "question and messages cannot be combined"),
        (TALK | {"messages": []}, "messages is empty"),
        (TALK | {"messages": "What?"}, "messages is not a list"),
        (TALK | {"messages": SAID[:2]}, "the last message is not a question"),
        (TALK | {"messages": [SAID[0], SAID[0]]}, "message 1 is a question without an answer"),
        (TALK | {"messages": [{"role": "system", "content": "Be brief."}, *SAID]}, "message 1 is a system prompt"),
        (TALK | {"messages": SAID[1:]}, "message 1 has role 'assistant', not 'user'"),
        (TALK | {"messages": [SAID[0], *SAID]}, "message 2 has role 'user', not 'assistant'"),
        (TALK | {"messages": [*SAID[:2], {"role": "user", "content": " "}]}, "the last message is empty"),
        (TALK | {"messages": [SAID[0], {"role": "assistant", "content": "\ud800"}, SAID[2]]}, "not valid text"),
        *((ROW | {name: 10**400}, "does not fit into 64 bits") for name in ("start", "fps", "frames", "frame_rate")),
    ],
)
def test_what_is_no_row(row, says):
    with pytest.raises(UsageError, match=says) as caught:
        read(jsonl(ROW | {"id": "1"}, row))
    assert caught.value.hint and "\n" not in caught.value.message


def test_messages_are_earlier_turns_and_the_question():
    (row,) = read(jsonl(TALK | {"options": ["red", "blue"]}))
    assert row.earlier == (Turn("Who?", "A man."),) and row.question == "What?"
    assert row.asked["messages"] == SAID[:2] and row.asked["question"] == "What?"
    single, alone = read(jsonl(ROW, {"video": "a.mp4", "messages": SAID[2:]}).replace(b'"What?"', b'"Why?"', 1))
    assert alone.earlier == () and "messages" not in alone.asked and single.asked.keys() == alone.asked.keys()
    with pytest.raises(UsageError, match="a table cannot contain messages"):
        read(b"video,messages\na.mp4,What?\n")
    assert row.id != read(jsonl(ROW | {"options": ["red", "blue"]}))[0].id


def test_times_for_rows_that_have_none_and_times_from_the_end():
    rows = read(jsonl(ROW, ROW | {"start": "-0:05"}, ROW | {"end": -2.5}), start_s=1.0, end_s=4.0)
    assert [(row.start_s, row.end_s) for row in rows] == [(1, 4), (-5, 4), (1, -2.5)]


def test_wrong_rows_are_named_with_their_lines():
    with pytest.raises(
        UsageError, match=r"(?m)rows, line 2: no video; line 4: not a JSON object; line 5: not JSON: .*$"
    ) as caught:
        read(jsonl(ROW, {}, ROW | {"id": 2}, [], "{"))
    assert caught.value.message.count("rows") == 1 and "more" not in caught.value.message
    with pytest.raises(UsageError, match=r"(?m)line 10: no video; and 1,990 more$"):
        read(jsonl(*[{}] * 2000))
    with pytest.raises(UsageError, match="line 3: more cells"):
        read(b"video,question\na,b\na,c,d\n")
    with pytest.raises(UsageError, match="line 2: "):
        read(b'video,question\na,"b\n')


HEAD = "rows: the first line must name the columns, .*`video` is missing"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        *((content, "rows contains no rows") for content in (b"", b"\n \n", b"video,question\n")),
        (b"a.mp4\nb.mp4\n", rf"{HEAD} \(found: a.mp4\)"),
        (b"file,question\n1,a.mp4\n", rf"{HEAD} \(found: file, question\)"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_files_without_rows(content, says):
    with pytest.raises(UsageError, match=says):
        read(content)


def test_all_that_is_wrong_is_named_at_once(tmp_path):
    (tmp_path / "here.mp4").touch()
    with pytest.raises(UsageError) as caught:
        RowReader(sampling=SamplingOptions(start_s=3.0, end_s=2.0)).pairs(
            ["a", f"{tmp_path}/here.mp4", "a", "b", "b"], ["1", "", "1"]
        )
    assert caught.value.message == (
        "the video 'a' is given twice; the video 'b' is given twice; the question '1' is given twice; '': question is empty; "
        "end 2 s is not after start 3 s; no such file: a; no such file: b"
    )
    with pytest.raises(UsageError) as caught:
        read(jsonl(ROW | {"video": "a.mp4"}, ROW | {"id": 2, "start": "500ms"}))
    assert caught.value.message == "rows, line 2: '500ms' is not a time; line 1: no such file: there/a.mp4"
    assert "1m30s" in caught.value.hint and "relative" in caught.value.hint and "yt-dlp" not in caught.value.hint
    with pytest.raises(UsageError) as caught:
        read(jsonl(ROW | {"video": "rtsp://example.org/a.mp4"}, {}))
    assert "evoprune watch rtsp://example.org/a.mp4 -Q " in caught.value.hint


def test_a_row_may_have_several_inputs():
    (row,) = read(jsonl({"inputs": ["a.mp4", "b.jpg"], "question": "Which?"}))
    assert (row.inputs, row.paths) == (("a.mp4", "b.jpg"), ("there/a.mp4", "there/b.jpg"))
    assert row.asked["inputs"] == ["a.mp4", "b.jpg"] and "video" not in row.asked
    (of_csv,) = read(b"question,inputs\nWhich?,a.mp4|b.jpg\n")
    assert of_csv == row
    (other,) = read(jsonl({"inputs": ["b.jpg", "a.mp4"], "question": "Which?"}))
    assert other.id != row.id and len(Span.group([row, other])) == 2
    (alone,), (named,) = (read(jsonl(ROW | own)) for own in ({}, {"inputs": [ROW["video"]], "video": None}))
    assert alone == named


def test_fields_as_other_tools_write_them():
    theirs = ROW | {"video_start": 1, "video_end": "0:03", "nframes": 8, "max_new_tokens": 5}
    (row,) = read(jsonl(theirs))
    assert (row.start_s, row.end_s, row.fps, row.frames, row.max_new_tokens) == (1.0, 3.0, None, 8, 5)
    (same,) = read(jsonl(ROW | {"start": 1, "end": 3, "frames": 8, "max_new_tokens": 5}))
    (of_csv,) = read(b"Video,QUESTION, Start ,end,nframes,max_new_tokens\na.mp4,What?,1,3,8,5\n")
    assert row == same == of_csv
    assert row.asked["frames"] == 8 and row.asked["max_new_tokens"] == 5 and "fps" not in row.asked
    (often,) = read(jsonl(ROW | {"fps": "0.5"}))
    (usual,) = read(jsonl(ROW))
    assert len({often.id, usual.id, row.id}) == 3
    spans = Span.group([often, row, usual, usual])
    # A row's own rate replaces the batch's number of frames, and vice versa.
    assert [span.sampling for span in spans] == [
        {"start_s": 0.0, "end_s": None, "fps": 0.5},
        {"start_s": 1.0, "end_s": 3.0, "frames": 8},
        {"start_s": 0.0, "end_s": None},
    ]
    by_rate, by_number = SamplingOptions(fps=2.0), SamplingOptions(frames=4)
    assert by_number.with_overrides(**spans[0].sampling) == SamplingOptions(fps=0.5)
    assert by_rate.with_overrides(**spans[1].sampling) == SamplingOptions(frames=8, start_s=1.0, end_s=3.0)
    assert by_rate.with_overrides(**spans[2].sampling) == by_rate


@pytest.mark.parametrize("written", ["8", "8.0", "8.", "8.000", " 8.0 ", "0.8e1"])
@pytest.mark.parametrize("name", ["frames", "nframes", "max_new_tokens"])
def test_whole_numbers_as_spreadsheets_write_them(name, written):
    (row,) = read(f"video,question,{name}\na.mp4,What?,{written}\n".encode())
    assert (row.max_new_tokens if "tokens" in name else row.frames) == 8
    (same,) = read(json.dumps({"video": "a.mp4", "question": "What?", name: 8.0}).encode())
    assert row.id == same.id and type(row.max_new_tokens if "tokens" in name else row.frames) is int


@pytest.mark.parametrize("written", ["8.5", "8,0", "nan", "inf", "1e400", "eight"])
@pytest.mark.parametrize("name", ["frames", "max_new_tokens"])
def test_other_numbers_are_no_whole_ones(name, written):
    with pytest.raises(UsageError, match=f"line 2: {name} is not a whole number") as caught:
        read(f"video;question;{name}\na.mp4;What?;{written}\n".encode())
    assert caught.value.hint


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("video,question,Video \na.mp4,What?,b.mp4\n", "the first line names the column video twice"),
        ("video,question,notes,NOTES\na.mp4,What?,x,\n", "the first line names the column notes twice"),
        ('{"video": "a.mp4", "question": "What?", "question": "Why?"}\n', "line 1: the field question appears twice"),
        ('[{"video": "a.mp4", "question": "What?", "video": "b.mp4"}]', "the field video appears twice"),
    ],
)
def test_a_field_that_is_there_twice(content, says):
    with pytest.raises(UsageError, match=says) as caught:
        read(content.encode())
    assert caught.value.hint


def test_columns_without_a_name_or_a_cell_are_none():
    (row,) = read(b"video,question,,\na.mp4,What?,,\n")
    assert row.question == "What?"


def test_fields_that_are_not_used_are_named_once():
    rows = [ROW | {"id": i, "strat": 5, "split": "test"} for i in range(2)] + [ROW | {"id": 2, "split": "test"}]
    with pytest.warns(EvopruneWarning) as said:
        read(jsonl(*rows))
    (warning,) = said
    assert str(warning.message) == "rows: unused fields: strat in 2 rows (did you mean start?), split in 3 rows"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(jsonl(ROW | {"type": "order", "groups": ["time"], "answer": 3, "subtitles": None, "other": None}))


def test_an_array_of_rows():
    array = f"[{json.dumps(ROW)},\n {json.dumps(ROW | {'id': 7})}]"
    assert [row.id for row in read(array.encode())] == [read(jsonl(ROW))[0].id, "7"]
    with pytest.raises(UsageError, match="rows, row 2: no video; row 3: not a JSON object"):
        read(b'[{"video": "a", "question": "b"}, {}, 3]')
    with pytest.raises(UsageError, match="rows is not JSON: "):
        read(b'[{"video": "a"},')


def test_paths_of_the_user_and_of_other_tools(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    names = ["~/a.mp4", "file:///clips/a%20b.mp4", "b.mp4"]
    rows = read(jsonl(*[ROW | {"video": name, "subtitles": name} for name in names]))
    assert [row.paths for row in rows] == [("/home/me/a.mp4",), ("/clips/a b.mp4",), ("there/b.mp4",)]
    assert [row.inputs[0] for row in rows] == names
    assert [row.subtitles_path for row in rows] == ["/home/me/a.mp4", "/clips/a b.mp4", "there/b.mp4"]


def test_a_video_inside_its_row_is_refused_in_a_line():
    with pytest.raises(UsageError) as caught:
        read(jsonl(ROW | {"video": "data:video/mp4;base64," + "A" * 10**6}, {}))
    assert caught.value.message == "rows, line 1: video is a data: URL, not a path; line 2: no video"
    assert "write it to a file" in caught.value.hint


some_rows = st.lists(
    st.builds(
        lambda number, video, **own: Row(str(number), (video,), (video,), "What?", **own),
        st.integers(),
        st.sampled_from("abc"),
        start_s=st.sampled_from([0.0, 1.0]),
        end_s=st.sampled_from([None, 2.0]),
        frames=st.sampled_from([None, 8]),
        frame_rate=st.sampled_from([None, 5.0]),
        subtitles_path=st.sampled_from([None, "a.srt"]),
    )
)


@settings(deadline=None)
@given(some_rows)
def test_rows_that_one_encoding_serves_are_together(rows):
    spans = Span.group(rows)
    assert sorted((row for span in spans for row in span.rows), key=id) == sorted(rows, key=id)
    keys = [(span.rows[0].paths, span.sampling) for span in spans]
    assert all(key not in keys[:i] for i, key in enumerate(keys))  # one encoding each
    for span, key in zip(spans, keys, strict=True):
        assert list(span.rows) == [row for row in rows if (row.paths, Span((row,)).sampling) == key]  # in their order
    videos = [path for path, *_ in keys]
    assert [v for i, v in enumerate(videos) if i == 0 or videos[i - 1] != v] == list(
        dict.fromkeys(r.paths for r in rows)
    )


@pytest.mark.parametrize(
    ("names", "found", "says"),
    [
        ("1.png 2.JPG times.txt", ".", None),
        ("10.mkv 2.mp4 1.webm .0.mp4 3.mp4/", "1.webm 2.mp4 10.mkv", "3 videos; skipped: 3.mp4/"),
        ("a.mp4 b.mp4 a.jpg notes.txt folder/", "a.mp4 b.mp4", "2 videos; skipped: a.jpg, folder/, notes.txt"),
        ("a.mp4", "a.mp4", None),
        ("a.png folder/", ".", "1 image as one video; subfolders are not searched (-r)"),
        ("a.mp4 b.mp4 a.jpg b.jpg", None, "contains 2 images and 2 videos"),
        ("a.txt", None, "no videos or images in the folder"),
    ],
)
def test_folders_of_images_and_of_videos(tmp_path, names, found, says):
    for name in names.split():
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    wrong = Problems()
    taken = list(in_folders([str(tmp_path), "gone.mp4"], wrong))
    if found is None:
        with pytest.raises(UsageError, match=says) as caught:
            wrong.check({})
        assert caught.value.hint
    else:
        assert taken == [*(str(tmp_path / name) for name in found.split()), "gone.mp4"]
        assert (left_out(str(tmp_path)) or None) == (says and f"{tmp_path}: {says}")


def test_both_files_of_a_live_photo_are_taken(tmp_path):
    """A folder that has only photos is no video, unlike a folder of JPEGs. Its photos are asked about one by one."""
    for name in ("IMG_1.HEIC", "IMG_1.MOV", "IMG_2.HEIC", "IMG_3.heif", "IMG_1.JPG"):
        (tmp_path / name).touch()

    def found(folder, **how):
        return [Path(row.video).name for row in RowReader().pairs([str(folder)], ["Why?"], **how)]

    (tmp_path / "IMG_2.MOV").touch()
    assert found(tmp_path) == ["IMG_1.MOV", "IMG_2.MOV"]
    assert found(tmp_path, pictures=True) == ["IMG_1.HEIC", "IMG_1.MOV", "IMG_2.HEIC", "IMG_2.MOV", "IMG_3.heif"]
    assert left_out(str(tmp_path), pictures=True).endswith("2 videos and 3 images; skipped: IMG_1.JPG")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.heic").touch()
    assert found(photos, pictures=True) == ["1.heic"]
    with pytest.raises(UsageError, match="no videos or images"):
        found(photos)


def test_a_photo_among_videos_is_taken(tmp_path):
    """Thumbnails named like a video are left out. Only some of the left-out files are named, the rest are counted."""
    for name in ("a.mp4", "b.mp4", "c.mov", "a.jpg", "b2.png", *(f"{n}.txt" for n in range(12))):
        (tmp_path / name).touch()
    folder = str(tmp_path)
    found = [Path(row.video).name for row in RowReader().pairs([folder], ["Why?"], pictures=True)]
    assert found == ["a.mp4", "b.mp4", "b2.png", "c.mov"]
    assert [Path(row.video).name for row in RowReader().pairs([folder], ["Why?"])] == ["a.mp4", "b.mp4", "c.mov"]
    names = ", ".join([*(f"{n}.txt" for n in range(10)), "and 3 more"])
    assert left_out(folder, pictures=True) == f"{folder}: 3 videos and 1 image; skipped: {names}"
