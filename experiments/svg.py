"""Build SVG documents and text elements for charts. Imported by experiments that draw; not a script."""

from collections.abc import Iterable
from xml.sax.saxutils import escape, quoteattr

# Figure colors, the same as in evoprune's charts. `COLOURS` can be distinguished by color-blind readers.
INK = "#222222"
SOFT = "#5F5F5F"
COLOURS = ("#0072B2", "#D55E00")
EDGE = 24  # margin around the document, in pixels
FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"
LOOK = {  # attributes of `text` with their default values, which are not written to the document
    "anchor": ("text-anchor", "start"), "fill": ("fill", INK), "size": ("font-size", 12), "weight": ("font-weight", 400),
}  # fmt: skip


def document(title: str, width: int, height: int, elements: Iterable[str]) -> str:
    """Return an SVG document of `width` x `height` pixels that shows the elements on a white card with a thin border."""
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
    """Return a text element whose baseline starts, is centered, or ends at (x, y). `look` may set fill, size, and weight."""
    look["anchor"] = anchor
    wanted = [(named, look[name]) for name, (named, usual) in LOOK.items() if look.get(name, usual) != usual]
    more = "".join(f" {named}={quoteattr(str(value))}" for named, value in wanted)
    return f'<text x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'
