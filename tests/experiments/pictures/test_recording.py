import xml.etree.ElementTree as ET
from pathlib import Path

from experiments.pictures.recording import Screen, drawing


def test_a_screen_knows_what_progress_writes():
    """Returns, erased lines, one line up and styles, as rich writes them for a line that goes away again."""
    screen = Screen()
    screen.write("\x1b[?25l\x1b[32m-\x1b[0m loading")
    assert screen.shown() == [(("-", "green"), (" loading", ""))]
    screen.write("\r\x1b[2K\x1b[32m/\x1b[0m reading\r\n\x1b[?25h\r\x1b[1A\x1b[2K")
    assert screen.shown() == [(), ()]
    screen.write("red\r\n\x1b[2mmodel\x1b[0m")
    assert screen.shown() == [(("red", ""),), (("model", "dim"),)]


def test_the_last_screen_is_what_shows_where_nothing_moves():
    made = ET.fromstring(drawing("evoprune ask", [(0.5, "loading"), (1.0, "\r\x1b[2Kred & blue\r\n")]))
    lines = {"".join(line.itertext()): line.get("class") for line in made.iter("{http://www.w3.org/2000/svg}text")}
    assert lines == {"$": "dim", "evoprune ask": "last", "loading": "passing", "red & blue": "last"}


def test_blanks_are_kept_by_programs_without_css():
    for text in (drawing("ls", [(0.1, "a   b")]), Path("docs/recording.svg").read_text(encoding="utf-8")):
        assert ET.fromstring(text).get("{http://www.w3.org/XML/1998/namespace}space") == "preserve"
