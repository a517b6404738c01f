"""Record a command in a terminal as an animated SVG. Imported by `experiments.pictures.examples`.

The command runs on a pseudo-terminal. What it writes appears when it was written, but the time until the first output, in which
Python starts and imports torch, is cut to a second. The picture plays once; where nothing moves, it is the last screen. POSIX only.
"""

import fcntl
import os
import re
import struct
import subprocess
import sys
import termios
import time
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

COLUMNS = 92
ROWS = 24
WIDE, TALL, EDGE = 7.8, 17, 16  # of a letter and a line, and around the text, in pixels
TYPED = 1.2  # seconds for the command
START = 1.0  # most seconds from the command to its first output
CODE = re.compile(r"\x1b\[([?0-9;]*)([A-Za-z])|(\r|\n)|([^\x1b\r\n]+)")
STYLES = {"0": "", "1": "bold", "2": "dim", "31": "red", "32": "green", "33": "yellow"}
STYLE = """
svg { background: #fff; --ink: #222; --dim: #5f5f5f; --red: #b42318; --green: #00734f; --yellow: #8a5a00 }
@media (prefers-color-scheme: dark) {
  svg { background: #161b22; --ink: #e6edf3; --dim: #9aa4ae; --red: #ff7b72; --green: #56d39b; --yellow: #e3b341 } }
text { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; fill: var(--ink); white-space: pre }
.bold { font-weight: 700 } .dim { fill: var(--dim) } .red { fill: var(--red) } .green { fill: var(--green) }
.yellow { fill: var(--yellow) } .passing { visibility: hidden }
.passing, .last { animation-duration: %.2fs; animation-timing-function: step-end; animation-fill-mode: forwards }
@media (prefers-reduced-motion: reduce) { .passing, .last { animation: none !important } }
"""

Line = tuple[tuple[str, str], ...]  # runs of text, each with its style


@dataclass
class Screen:
    """A terminal, as far as this program's output needs one: lines, styles, returns, one line up, and erased lines."""

    lines: list[list[tuple[str, str]]] = field(default_factory=lambda: [[]])  # a letter and its style
    row: int = 0
    column: int = 0
    style: str = ""

    def write(self, text: str) -> None:
        for code, name, move, letters in CODE.findall(text):
            if letters:
                line = self.lines[self.row]
                line += [(" ", "")] * (self.column - len(line))
                line[self.column : self.column + len(letters)] = [(letter, self.style) for letter in letters]
                self.column += len(letters)
            elif move:
                self.column = 0
                self.row += move == "\n"
                self.lines += [[]] * (self.row - len(self.lines) + 1)
                self.lines[self.row] = [*self.lines[self.row]]
            elif name == "m":
                self.style = " ".join(filter(None, (STYLES.get(each, "") for each in code.split(";"))))
            elif name == "A":
                self.row = max(0, self.row - int(code or 1))
            elif name == "K":
                self.lines[self.row] = []

    def shown(self) -> list[Line]:
        """Return the lines as they stand, in runs of one style."""
        made = []
        for line in self.lines:
            runs: list[tuple[str, str]] = []
            for letter, style in line:
                if runs and runs[-1][1] == style:
                    runs[-1] = (runs[-1][0] + letter, style)
                else:
                    runs.append((letter, style))
            made.append(tuple(runs))
        return made


def record(arguments: list[str]) -> list[tuple[float, str]]:
    """Runs `evoprune` with these arguments; what it wrote, with seconds since its first output. Raises SystemExit if it fails."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    command = [sys.executable, "-m", "evoprune_cli", *arguments]
    began = time.monotonic()
    pieces = []
    process = subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=os.environ | {"TERM": "xterm-256color"})  # noqa: S603
    os.close(its)
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # how Linux says that the other end is closed
            break
        if not piece:
            break
        pieces.append((time.monotonic() - began, piece.decode()))
    if process.wait():
        raise SystemExit("".join(text for _, text in pieces))
    cut = max(0.0, pieces[0][0] - START)
    return [(moment - cut, text) for moment, text in pieces]


def drawing(command: str, pieces: list[tuple[float, str]]) -> str:
    """Return the SVG of a recording. Programs that know no CSS `white-space` keep its blanks by `xml:space`."""
    screen, known, spans = Screen(), {}, []  # known: of each row, since when it has which line
    for moment, text in pieces:
        screen.write(text)
        for row, line in enumerate(screen.shown()):
            since, old = known.get(row, (0.0, ()))
            if line != old:
                spans.append((row, old, since, moment))
                known[row] = (moment, line)
    total = TYPED + pieces[-1][0] + 0.1
    spans += [(row, line, since, None) for row, (since, line) in known.items()]
    height = max(known) + 2
    body = [_typed(command, total)]
    for number, (row, line, since, until) in enumerate(span for span in spans if span[1]):
        body.append(_line(number, row + 1, line, (since + TYPED) / total, until and (until + TYPED) / total))
    width = round(COLUMNS * WIDE + 2 * EDGE)
    tall = round(height * TALL + 2 * EDGE)
    size = f'width="{width}" height="{tall}" viewBox="0 0 {width} {tall}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" xml:space="preserve">'
    return "\n".join(
        [head, f"<title>{escape(command)}</title>", f"<style>{STYLE % total}</style>", *body, "</svg>", ""]
    )


def _typed(command: str, total: float) -> str:
    """Return the prompt and the command, letter after letter."""
    frames = "".join(
        f"{100 * TYPED * n / len(command) / total:.2f}% {{ clip-path: inset(0 {100 - 100 * n / len(command):.1f}% 0 0) }} "
        for n in range(len(command) + 1)
    )
    return (
        f'<style>@keyframes typed {{ {frames}}}</style><text x="{EDGE}" y="{EDGE + 13}" class="dim">$</text>'
        f'<text class="last" x="{EDGE + 2 * WIDE}" y="{EDGE + 13}" textLength="{len(command) * WIDE:.1f}" '
        f'style="animation-name: typed">{escape(command)}</text>'
    )


def _line(number: int, row: int, line: Line, since: float, until: float | None) -> str:
    """Return a line of the terminal that is visible from one share of the time to another, or to the end."""
    hidden = f" {100 * until:.2f}% {{ visibility: hidden }}" if until else ""
    css = f"@keyframes l{number} {{ 0% {{ visibility: hidden }} {100 * since:.2f}% {{ visibility: visible }}{hidden} }}"
    made = []
    column = 0
    for words, style in line:
        place = f'x="{EDGE + column * WIDE:.1f}" textLength="{len(words) * WIDE:.1f}"'
        kind = f' class="{style}"' if style else ""
        made.append(f"<tspan {place}{kind}>{escape(words)}</tspan>")
        column += len(words)
    kind = "passing" if until else "last"
    place = f'y="{EDGE + 13 + row * TALL}" style="animation-name: l{number}"'
    return f'<style>{css}</style><text class="{kind}" {place}>{"".join(made)}</text>'
