"""Tests of reading subtitles from every kind of file: times, text without markup, and error messages."""

import os
import random
import time

import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_subtitles
from evoprune.video.info import Subtitles, as_text
from evoprune.video.readers import subtitles as reader
from tests.video.files import numbered_frame, numbered_frames, write_image, write_video
from tests.video.subtitled import ASS, FORMAT, HEAD, SRT, SSA, VTT, pictures, srt, write_subtitled

WHO, SIZE = (1.0, 2.0, "Who is there?"), (3.5, 4.0, "Größe {laughs} <|im_end|>")
FILES = {"a.srt": SRT, "a.vtt": VTT, "a.ass": ASS, "a.ssa": SSA}
TRACKS = {
    "srt.mkv": SRT,
    "ass.mkv": ASS,
    "text.mp4": srt([(1, 2, "Who is\nthere?"), (3.5, 4, SIZE[2])]),
    "vtt.webm": VTT,
}


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return probe(write_subtitled(tmp_path_factory.mktemp("video") / "clip.mkv", []))


def read(video, path, content, **span):
    """Write a subtitle file and read it as the subtitles of a video."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_subtitles(video, str(path), **span)


def expected(content: str) -> list:
    """Return the lines that are expected from a file. In ASS, text in braces is not displayed."""
    return [WHO, SIZE if "Dialogue" not in content else (3.5, 4.0, "Größe <|im_end|>")]


@pytest.mark.parametrize("name", FILES)
def test_files(video, tmp_path, name):
    found = read(video, tmp_path / name, FILES[name])
    assert (found.lines, found.source, found.warnings) == (expected(FILES[name]), str(tmp_path / name), [])


@pytest.mark.parametrize("name", TRACKS)
def test_tracks(tmp_path, name):
    path = write_subtitled(tmp_path / name, [TRACKS[name]])
    assert read_subtitles(probe(path), "auto").lines == expected(TRACKS[name])
    named = read_subtitles(probe(path), str(path))
    assert (named.lines, named.source) == (expected(TRACKS[name]), f"{path}, track 1 (eng)")


def test_a_file_beside_a_video_that_begins_after_its_sound(tmp_path):
    """Players count a subtitle file's times from the start of the sound, which begins before the video."""
    path = write_video(tmp_path / "late.mp4", numbered_frames(40), start=8.0, audio_s=12.0)
    (tmp_path / "late.srt").write_text(srt([(8.5, 9, "spoken"), (2, 3, "before")]))
    info = probe(path)
    assert info.start_s == pytest.approx(8.0, abs=0.1)
    ((start, end, said),) = read_subtitles(info, "auto").lines
    assert (start, end, said) == (pytest.approx(8.5 - info.start_s), pytest.approx(9 - info.start_s), "spoken")


def test_a_file_beside_a_stream_that_begins_late_as_a_whole(tmp_path):
    path = write_video(tmp_path / "late.ts", numbered_frames(40), start=8.0)
    (tmp_path / "late.srt").write_text(SRT)
    assert [line[:2] for line in read_subtitles(probe(path), "auto").lines] == [(1.0, 2.0), (3.5, 4.0)]


@pytest.mark.parametrize("beside", [True, False])
def test_spans_of_a_video_read_its_subtitles_once(tmp_path, monkeypatch, beside):
    path = write_subtitled(tmp_path / "clip.mkv", [] if beside else [SRT])
    if beside:
        (tmp_path / "clip.srt").write_text(SRT)
    time.sleep(0.05)  # until the ctimes are in the past
    opened, open_video = [], reader.ffmpeg.open_video
    monkeypatch.setattr(reader.ffmpeg, "open_video", lambda file: opened.append(file) or open_video(file))
    spans = [(0.0, 1.5), (1.5, 9.0), (0.0, 9.0), (5.0, 9.0)]

    def lines():
        return [reader.read(str(path), 0.0, "auto", *span).lines for span in spans]

    assert lines() == [[WHO], [WHO, SIZE], [WHO, SIZE], []] and len(opened) == 1
    (tmp_path / "clip.srt").write_text(srt([(5, 6, "new")]))
    assert lines() == [[], [(5.0, 6.0, "new")]] + [[(5.0, 6.0, "new")]] * 2


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_encodings(video, tmp_path, encoding, newline):
    found = read(video, tmp_path / "a.srt", SRT.replace("\n", newline).encode(encoding))
    assert found.lines == [WHO, SIZE] and found.warnings == (["subtitles_encoding"] if encoding == "cp1252" else [])


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("你好 世界", "utf-8"),
        ("déjà vu", "utf-8"),
        ("déjà vu", "utf-8-sig"),
        ("plain", "utf-8-sig"),
        ("déjà vu", "utf-16"),
    ],
)
def test_one_bad_byte_does_not_change_the_encoding_of_the_other_lines(video, tmp_path, text, encoding):
    whole = f"1\n00:00:01,000 --> 00:00:02,000\n{text}\n\n2\n00:00:03,000 --> 00:00:04,000\nb".encode(encoding)
    found = read(video, tmp_path / "a.srt", whole + b"\xff")
    assert found.lines == [(1.0, 2.0, text), (3.0, 4.0, "b\ufffd")] and found.warnings == ["damaged_subtitles"]


def test_a_null_character_does_not_hide_the_text(video, tmp_path):
    with pytest.raises(VideoError, match="is not text"):
        read(video, tmp_path / "a.srt", srt([(1, 2, "a\0b")]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (SRT.replace("Größe", "Привет, мир").encode("cp1251"), "is neither UTF-8"),
        (SRT.replace("Größe", "今日は、世界").encode("shift-jis"), "is neither UTF-8"),
        (srt([(1, 2, "你好，世界")]).encode("gb18030"), "is neither UTF-8"),
        (bytes(range(1, 256)) * 50, "is neither UTF-8"),
        (bytes(range(256)) * 50, "cannot read subtitles"),
        (SRT.encode("utf-16-le"), "cannot read subtitles"),
        (b"", "contains no subtitles"),
        ("Hello\n", "contains no subtitles"),
        (srt([(1, 2, "a" * 5000)]), "a line of more than 4,000 bytes"),
        (b"x" * 50_000_000, "larger than 10 MiB"),
        (pictures(), "images"),
    ],
    ids=[
        "Cyrillic", "Japanese", "Chinese", "no text", "binary", "UTF-16 without mark", "empty", "prose", "a long line", "50 MB",
        "PGS",
    ],
)  # fmt: skip
def test_what_is_no_text_that_can_be_read_is_refused(video, tmp_path, content, says):
    with pytest.raises(VideoError, match=says) as refused:
        read(video, tmp_path / "a.srt", content)
    assert refused.value.hint


@pytest.mark.parametrize("name", ["none.srt", ".", os.devnull])
def test_what_is_no_file_is_refused(video, name):
    with pytest.raises(VideoError, match=r"no such subtitle file|is not a subtitle file"):
        read_subtitles(video, name)


def test_tracks_that_begin_late_or_are_damaged(tmp_path):
    path = write_subtitled(tmp_path / "late.mkv", [SRT], start_s=10.0)
    assert read_subtitles(probe(path), "auto").lines == [WHO, SIZE]  # times are counted from the first frame
    path = write_subtitled(tmp_path / "old.mkv", [SRT], encoding="cp1252")
    found = read_subtitles(probe(path), "auto")
    assert found.lines == [WHO] and found.warnings == ["damaged_subtitles"]


@pytest.mark.parametrize(
    ("beside", "taken"),
    [
        (["clip.ass", "clip.vtt", "clip.SRT", "clip.en.srt"], "clip.SRT"),
        (["clip.ass", "clip.vtt"], "clip.vtt"),
        (["clip.pt-BR.srt", "clips.srt", "clip.long.name.srt", "clip.txt"], "clip.pt-BR.srt"),
        (["clip.en.srt", "clip.de.srt"], "track 1 (eng)"),
        ([], "track 1 (eng)"),
    ],
)
def test_auto_takes_a_file_beside_the_video_or_its_track(tmp_path, beside, taken):
    path = write_subtitled(tmp_path / "clip.mkv", [VTT])
    for name in beside:
        (tmp_path / name).write_text(SRT)
    found = read_subtitles(probe(path), "auto")
    assert found.source == (str(tmp_path / taken) if taken in beside else taken) and found.lines == [WHO, SIZE]


@pytest.mark.parametrize(
    ("texts", "default", "source", "note"),
    [
        ([SRT, ASS], 1, "track 2 (eng)", None),
        ([pictures(), SRT], 0, "track 2 (eng)", None),
        ([SRT, ASS], None, None, "2 text tracks, none of them marked as default"),
        ([pictures()], 0, None, "are images"),
        ([], None, None, "no file next to the video"),
    ],
)
def test_auto_among_several_tracks(tmp_path, texts, default, source, note):
    found = read_subtitles(probe(write_subtitled(tmp_path / "clip.mkv", texts, default=default)), "auto")
    assert found.source == source and (note or "") in (found.note or "") and bool(found.lines) == bool(source)


def test_a_folder_of_frames_has_subtitles_beside_it(tmp_path):
    folder = tmp_path / "take.1"
    folder.mkdir()
    write_image(folder / "0.png", numbered_frame(0))
    assert read_subtitles(probe(folder), "auto").source is None
    (tmp_path / "take.1.srt").write_text(SRT)
    assert read_subtitles(probe(f"{folder}/"), "auto").lines == [WHO, SIZE]


@pytest.mark.parametrize(
    ("span", "kept"),
    [
        ((0, 9), "abcd"),
        ((2, 9), "bcd"),
        ((2.1, 3.5), "bc"),
        ((0, 1), ""),
        ((3, 4), "bc"),
        ((5, 6), "d"),
        ((0, 5), "abc"),
    ],
)
def test_lines_of_a_part_of_the_video(video, tmp_path, span, kept):
    text = srt([(3, 4, "c"), (1, 2, "a"), (5, 5, "d"), (1.5, 3.9, "b")])
    lines = read(video, tmp_path / "a.srt", text, start_s=span[0], end_s=span[1]).lines
    assert "".join(line[2] for line in lines) == kept


@pytest.mark.parametrize(
    ("cues", "kept"),
    [
        (
            [(0, 2, "a b"), (2, 2.01, "a b"), (2.01, 4, "a b\nc d"), (4, 6, "c d\ne")],
            [(0, 4, "a b"), (2.01, 6, "c d"), (4, 6, "e")],
        ),
        ([(0, 1, "No."), (1.083, 2, "No.")], [(0, 1, "No."), (1.083, 2, "No.")]),
        ([(0, 1, "No."), (1.04, 2, "No.")], [(0, 2, "No.")]),
        ([(0, 5, "a sign"), (1, 2, "x"), (2, 3, "a sign\ny")], [(0, 5, "a sign"), (1, 2, "x"), (2, 3, "y")]),
    ],
    ids=["rolling", "said twice", "shown on", "on screen already"],
)
def test_what_is_on_screen_already_counts_once(video, tmp_path, cues, kept):
    assert read(video, tmp_path / "a.srt", srt(cues)).lines == kept


def cue(*lines: str) -> str:
    """Return an SRT cue with the given lines before the text "a"."""
    return "\n".join([*lines, "a", ""])


def in_form(form: str, start: str, end: str) -> str:
    """Return a subtitle file in the format `form` that has a single cue from `start` to `end`."""
    return {
        "srt": cue("7", f"{start} --> {end}"),
        "vtt": f"WEBVTT\n\nname\n{start} --> {end} align:start\na\n",
        "ass": HEAD + FORMAT + f"Dialogue: 0,{start},{end},Default,,0,0,0,,a\n",
    }[form]


@pytest.mark.parametrize(
    ("form", "start", "end", "seconds"),
    [
        ("srt", "00:00:01,500", "0:01:03.250", (1.5, 63.25)),
        ("srt", "100:00:00,250", "100:00:01,000", (360000.25, 360001.0)),
        ("vtt", "01:02.500", "00:01:05.250", (62.5, 65.25)),
        ("ass", "0:00:01.50", "00:01:05.25", (1.5, 65.25)),
    ],
)
def test_times(video, tmp_path, form, start, end, seconds):
    assert read(video, tmp_path / f"a.{form}", in_form(form, start, end), end_s=1e9).lines == [(*seconds, "a")]


@pytest.mark.parametrize(
    ("form", "start", "end"),
    [
        ("srt", "00:00:04,5", "00:00:05,250"),
        ("srt", "00:00:01,500000", "00:00:03,250000"),
        ("srt", "01:02,500", "01:05,500"),
        ("srt", "00:00:01", "00:00:02"),
        ("srt", "-00:00:01,500", "00:00:02,250"),
        ("vtt", "00:00:03,000", "00:00:04,000"),
        ("vtt", "00:05", "00:06"),
        ("ass", "0:00:01.500", "0:00:02.500"),
    ],
)
def test_times_that_ffmpeg_would_read_wrong_are_refused(video, tmp_path, form, start, end):
    with pytest.raises(VideoError, match="have times in an unsupported format") as refused:
        read(video, tmp_path / f"a.{form}", in_form(form, start, end))
    assert start in refused.value.message and "write times like 0" in refused.value.hint


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    "line",
    [
        "00:00:01,500-->00:00:02,500",
        "  00:00:01,500\t-->  00:00:02,500  ",
        "00:00:01,500 --> 00:00:02,500 X1:10 X2:20 Y1:30 Y2:40",
    ],
)
def test_blanks_and_settings_in_a_line_of_times(video, tmp_path, line, newline):
    assert read(video, tmp_path / "a.srt", cue("1", line).replace("\n", newline)).lines == [(1.5, 2.5, "a")]


@pytest.mark.parametrize(
    "line",
    [
        "00:00:01, 500 --> 00: 00: 02 ,500",
        "00:00:01,500 -> 00:00:02,500",
        "00:00:01;500 - -> 00:00:02;500",
        "00:00:01,500 \N{EN DASH}> 00:00:02,500",
        "00:00:01,500 \N{RIGHTWARDS ARROW} 00:00:02,500",
        "00:00:01,500 --&gt; 00:00:02,500",
    ],
)
def test_a_line_of_times_that_ffmpeg_would_take_for_text_is_refused(video, tmp_path, line):
    with pytest.raises(VideoError, match="have times in an unsupported format"):
        read(video, tmp_path / "a.srt", cue("00:00:00.500 --> 00:00:01,000") + "\n" + cue("2", line))


def test_text_is_never_taken_for_times(video, tmp_path):
    said = ["3:20 to 4:10", "Train 00:00:07,500 --> 00:00:08,500", "00:00:09,500 --> later", "1:02.5"]
    found = read(video, tmp_path / "a.srt", cue("1", "00:00:01,500 --> 00:00:03,500", "5", *said))
    assert found.lines == [(1.5, 3.5, f"5 {' '.join(said)} a")]
    inner = "WEBVTT\n\n00:01.500 --> 00:03.500\n00:02.5 to 00:03<00:02.500> word 0:00:04.5\n"
    assert read(video, tmp_path / "a.vtt", inner).lines == [(1.5, 3.5, "00:02.5 to 00:03 word 0:00:04.5")]
    events = [
        "Dialogue: 0,0:00:01.50,0:00:03.50,Default,,0,0,0,,a, 0:00:01.5,0:00:03.5, b",
        "Comment: 0,0:00:01.5,0:00:02,,,,,,,c",
    ]
    found = read(video, tmp_path / "a.ass", HEAD + FORMAT + "\n".join(events) + "\n")
    assert found.lines == [(1.5, 3.5, "a, 0:00:01.5,0:00:03.5, b")]


ONE, TWO = "00:01.000 --> 00:02.000", "00:03.000 --> 00:04.000"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (f"WEBVTT\n\n{ONE}\na\n\nits second paragraph\n\n{TWO}\nb", "a|b"),
        (f"WEBVTT\n{ONE}\na\n\n{TWO}\nb", "a|b"),
        (f"WEBVTT - a title\nKind: captions\nX-TIMESTAMP-MAP=LOCAL:00:00:00.000,MPEGTS:900000\n\n{ONE}\na", "a"),
        (f"WEBVTT\n\nNOTES-1\n{ONE}\na\n\nSTYLED\n{TWO}\nb\n\nREGION 7\n00:05.000 --> 00:06.000\nc", "a|b|c"),
        (f"WEBVTT\n\nNOTE a\nb\n\nSTYLE\n::cue {{}}\n\nREGION\nid:x\n\n{ONE}\na\n\nNOTE\n\n{TWO}\nb\nNOTE c", "a|b NOTE c"),
        (f"WEBVTT\n\n{ONE}\na\n{TWO}\nb\nid\n00:05.000 --> 00:06.000\nc", "a|b id|c"),
        (f"WEBVTT\n\n1\n\n{ONE} align:start position:0%\n2020\n \n\tb", "2020 b"),
        ("WEBVTT\n\n0:00:01.000-->000:00:02.000line:0\na", "a"),
        (f"WEBVTT\n\n{ONE}\n<v.loud Bob &amp; Al><c.x>a</c> <i>b <b>c</b></i><00:01.500> <ruby>d<rt>e</rt></ruby></v>", "a b c de"),
        (f"WEBVTT\n\n{ONE}\nI <3 you, 4 > 3, <c\n.x>b</c> {{x}} \\N", "I 3, b {x} \\N"),
        (f"WEBVTT\n\n{ONE}\nI <3 you", "I <3 you"),
        (f"WEBVTT\n\n{ONE}\n&quot;it&#39;s&quot; caf&eacute; &#x2014; Q&A &amp;lt; &lt;i&gt;", "\"it's\" café — Q&A &lt; <i>"),
        (f"WEBVTT\n\n{ONE}\n&#{'9' * 5000}; &unknown; & a", "\ufffd" + "9" * 4968 + "; &unknown; & a"),
        (f"\ufeffWEBVTT\r\n\r\n{ONE}\ra\r\nb\r\n\r\nx\r\r{TWO}\nc\0d", "a b|c\ufffdd"),
        (f"WEBVTT\n\n{ONE}\na\u2028b\x0cc\x85d", "a b c d"),
    ],
)  # fmt: skip
def test_webvtt_is_read_as_browsers_do(video, tmp_path, content, said):
    found = read(video, tmp_path / "a.vtt", content)
    assert "|".join(line[2] for line in found.lines) == said and found.warnings == []


@pytest.mark.parametrize(
    "times",
    [
        "00:01,000 --> 00:02,000",
        "00:01 --> 00:02",
        "00:61.000 --> 01:02.000",
        "1:01.000 --> 1:02.000",
        "00:01.5 --> 0:2.0",
    ],
)
def test_a_webvtt_cue_with_wrong_times_is_left_out_with_a_warning(video, tmp_path, times):
    content = f"WEBVTT\n\n{times}\na\n\n{TWO}\nb\n"
    found = read(video, tmp_path / "a.vtt", content)
    assert found.lines == [(3.0, 4.0, "b")] and found.warnings == ["damaged_subtitles"]


EVENT = "0:00:01.00,0:00:02.00"


@pytest.mark.parametrize("name", ["a.ass", "track.mkv"])
@pytest.mark.parametrize(
    ("fields", "event"),
    [
        ("Layer, Start, End, Style, Text", f"0,{EVENT},Default,Yes, she came"),
        ("layer,start,end,TEXT", f"0,{EVENT},Yes, she came"),
        ("Marked, Start, End, Style, Text", f"Marked=0,{EVENT},Default,Yes, she came"),
        ("Layer, Start, End, Style, Name, Text, Effect", f"0,{EVENT},Default,Ann,Yes, she came,"),
        ("Layer, Start, End, Effect, MarginL, MarginR, MarginV, Name, Style, Text", f"0,{EVENT},,0,0,0,,,Yes, she came"),
        ("Layer, Start, End, Style, Name, MarginL, MarginR, MarginV, Effect, More, Text", f"0,{EVENT},,,,,,,,Yes, she came"),
    ],
)  # fmt: skip
def test_the_format_of_ass_says_where_the_text_begins(video, tmp_path, name, fields, event):
    content = f"{HEAD}Format: {fields}\nDialogue: {event}\n"
    if name == "a.ass":
        found = read(video, tmp_path / name, content)
    else:
        found = read_subtitles(probe(write_subtitled(tmp_path / name, [content])), "auto")
    assert found.lines == [(1.0, 2.0, "Yes, she came")]


@pytest.mark.parametrize(
    ("fields", "event"),
    [
        ("Format: Start, End, Text", f"{EVENT},Yes, she came"),
        ("Format: Text, End, Start", "Yes, she came,0:00:02.00,0:00:01.00"),
        ("Format: Style, Text", f"0,{EVENT},Default,,0,0,0,,Yes, she came"),
        ("", f"0,{EVENT},Default,,0,0,0,,Yes, she came"),
    ],
)
def test_ass_files_whose_events_have_another_order_or_no_format(video, tmp_path, fields, event):
    content = f"{HEAD}{fields}\nDialogue: {event}\nDialogue: 0,x\nComment: {event}\n"
    assert read(video, tmp_path / "a.ass", content).lines == [(1.0, 2.0, "Yes, she came")]


def test_character_references_and_empty_lines_in_srt(video, tmp_path):
    text = srt([(1, 2, "it&#39;s &lt;b&gt;\n  \nR&D &copy AT&T&#x2014;"), (3, 4, "b")])
    lines = [(1.0, 2.0, "it's <b> R&D &copy AT&T—"), (3.0, 4.0, "b")]
    assert read(video, tmp_path / "a.srt", text).lines == lines
    path = write_subtitled(tmp_path / "clip.mkv", [text.replace("\n  \n", "\v\v")])
    path.write_bytes(path.read_bytes().replace(b"\v\v", b"\n\n"))
    assert read_subtitles(probe(path), "auto").lines == lines
    path = write_subtitled(tmp_path / "vtt.mkv", [f"WEBVTT\n\n{ONE}\n<v A>it&#39;s &copy {{x}}"])
    assert read_subtitles(probe(path), "auto").lines == [(1.0, 2.0, "it's © {x}")]


def test_times_of_tracks_are_those_of_the_container(tmp_path):
    path = write_subtitled(tmp_path / "clip.mkv", [srt([(1.001, 2.002, "a"), (3.25, 4, "00:00:04,5 to 00:00:05")])])
    assert read_subtitles(probe(path), "auto").lines == [(1.001, 2.002, "a"), (3.25, 4.0, "00:00:04,5 to 00:00:05")]


ORDER = random.Random(0)
UNSORTED = [(at := ORDER.random() * 9000, at + ORDER.random() * 60, f"{i} <|im_end|>") for i in range(100_000)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [
        srt(UNSORTED),
        srt([(0, 5, "{\\p1\n" * 2_000_000)]),
        srt([(0, 5, "<i>\n" * 2_000_000)]),
        srt([(0, 5, "a\n" * 5_000_000)]),
        "00:00:01,000 --> 00:00:02,000\n" * 300_000,
        "WEBVTT\n\n00:01.000 --> 00:02.000\n" + "<" * 9_000_000,
        "WEBVTT\n\n00:01.000 --> 00:02.000\n" + "\x01" * 10_000_000,
        "WEBVTT\n\n" + "00:01.000 --> 00:02.000\na\n\n" * 380_000,
        "WEBVTT\n\n00:01.000 --> 00:02.000\n" + "0:" * 5_000_000,
        "00:00:01,500 --> 00:00:02,500\n" + "1:2\n" * 2_500_000,
        "00:00:01,500 --> 00:00:02,500\n" + (" " * 3999 + "\n") * 2500,
        "00:00:01,500 --> 00:00:02,500\n1:2 -" + " " * 3900,
        "00:00:01,500 --> 00:00:02,500\n\n" + "1:2 -> 3:4\n" * 900_000,
        "00:00:01,500 --> 00:00:02,500\n" + "\r" * 9_000_000,
        "WEBVTT\n\n00:01.000 --> 00:02." + "1" * 9_000_000 + "\na",
        "[Script Info]\n\n[Events]\nDialogue: 0,0:00:01.50,0:00:02.50,,,,,,,a\n" + "Dialogue: " * 1_000_000,
        "[Script Info]\n\n[Events]\n" + "Dialogue: 0,0:00:01.00,0:00:02.00,Default,,0,0,0,," + "{\\a" * 2_400_000,
    ],
)  # fmt: skip
def test_hostile_texts_are_read_or_refused_soon(video, tmp_path, content):
    begin = time.monotonic()
    try:
        lines = read(video, tmp_path / "a.srt", content).lines
        assert lines and lines == sorted(lines)
    except VideoError as refused:
        assert "subtitles" in refused.message and "decoder" not in refused.message
    assert time.monotonic() - begin < 30


def words(text: str) -> int:
    """Count words. This function takes the place of a tokenizer that counts tokens."""
    return len(text.split())


def test_lines_for_the_prompt():
    lines = Subtitles("a", [(3661.9, 3662.0, "x"), (-3.0, 1.0, "y")]).fitted(99, words).text
    assert lines == "Subtitles:\n[1:01:01] x\n[0:00] y\n\n"
    # The long line is left out completely.
    long = [(0.0, 1.0, "short"), (1.0, 2.0, "word " * 10**6), (2.0, 3.0, "brief")]
    fitted = Subtitles("a", long).fitted(100, words)
    assert fitted.text == "Subtitles:\n[0:00] short\n[0:02] brief\n\n" and fitted.lines == 3


@pytest.mark.parametrize("limit", [1, 20, 100, 2048])
@pytest.mark.parametrize("count", [0, 1, 7, 400])
def test_the_most_lines_that_fit_evenly(limit, count):
    lines = [(float(n), n + 1.0, f"a few words {n}") for n in range(count)]

    def text(kept: int) -> str:
        return as_text([lines[int((i + 0.5) * count / kept)] for i in range(kept)])

    fitted = Subtitles("a.srt", lines).fitted(limit, words)
    kept = fitted.lines_in_prompt
    assert fitted.lines == count and fitted.text == (text(kept) if kept else "")
    assert fitted.tokens == words(fitted.text) <= limit
    assert kept == count or words(text(kept + 1)) > limit


def test_a_relative_file_is_found_beside_a_video_with_an_absolute_path(video, tmp_path, monkeypatch):
    """The reading process may still be in the folder of an earlier video."""
    for name, text in (("a", "wrong"), ("b", "right")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "y.srt").write_text(srt([(1, 2, text)]))
    (tmp_path / "a" / "x.mkv").symlink_to(video.path)
    monkeypatch.chdir(tmp_path / "a")
    probe("x.mkv")
    monkeypatch.chdir(tmp_path / "b")
    assert read_subtitles(probe(video.path), "y.srt").lines == [(1.0, 2.0, "right")]


def test_a_folder_that_cannot_be_listed_leaves_the_track(tmp_path, monkeypatch):
    path = write_subtitled(tmp_path / "track.mkv", [SRT])
    monkeypatch.setattr(reader, "_beside", lambda path: os.listdir(tmp_path / "gone"))
    assert reader.read(str(path), 0.0, "auto", 0.0, 1e9).lines == expected(SRT)
    bare = write_subtitled(tmp_path / "bare.mkv", [])
    assert "cannot be listed" in reader.read(str(bare), 0.0, "auto", 0.0, 1e9).note
