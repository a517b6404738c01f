"""Elements of SVG pictures: an opaque card, which pages show well in light and dark mode, text, and colours."""

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

# Colours that colour-blind readers can distinguish on white (Okabe and Ito, https://jfly.uni-koeln.de/color/).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, SOFT, PALE, GRID = "#222222", "#5F5F5F", "#8C8C8C", "#E4E4E4"  # PALE: lines beside those in INK
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
LETTER = 6.7  # pixels: the average width of a letter of size 12
BOLD = 7 / 6  # and how much wider bold letters are, in the widest of these fonts
LOOK = {  # of `text`: attributes, and what is not written
    "anchor": ("text-anchor", "start"), "fill": ("fill", INK), "size": ("font-size", 12), "weight": ("font-weight", 400),
    "transform": ("transform", ""),
}  # fmt: skip


def document(title: str, width: int, height: int, elements: Iterable[str]) -> str:
    """An SVG document of so many pixels: a white card with a thin edge, and the elements on it."""
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}" role="img"'
    look = f'font-family="{FONT}" font-size="12" fill="{INK}"'
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {look}>',
        "<!-- evoprune -->",
        f"<title>{escape(title)}</title>",
    ]
    card = f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6" fill="#FFFFFF" stroke="#D0D0D0"/>'
    return "\n".join([*head, card, *elements, "</svg>", ""])


def text(x: float, y: float, words: str, anchor: str = "start", **look: str | float) -> str:
    """Words whose baseline starts, is centred or ends at (x, y). `look`: fill, size, weight, transform."""
    look["anchor"] = anchor
    wanted = [(named, look[name]) for name, (named, usual) in LOOK.items() if look.get(name, usual) != usual]
    more = "".join(f" {named}={quoteattr(str(value))}" for named, value in wanted)
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def reach(words: str, size: float = 12, weight: int = 400) -> float:
    """About how many pixels wide the words are."""
    return LETTER * len(words) * size / 12 * (BOLD if weight > 400 else 1)
