"""Text in pictures, in the font that comes with Pillow: ASCII letters; any other character is drawn as a box."""

from functools import cache

from PIL import Image, ImageDraw, ImageFont

BACKGROUND, INK, FAINT = (18, 18, 22), (235, 235, 240), (160, 160, 170)


def text_picture(text: str, width: int, size: int, colour: tuple[int, int, int] = INK, rows: int = 1) -> Image.Image:
    """RGB picture of a text that is wrapped to a width in pixels; it has room for at least so many rows."""
    lines, height = wrap(text, width, size), round(1.3 * size)
    picture = Image.new("RGB", (width, height * max(rows, len(lines))), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((0, row * height), line, colour, _font(size))
    return picture


def wrap(text: str, width: int, size: int) -> list[str]:
    """The rows of a text, none wider than so many pixels. A word that is wider than a row is broken."""
    rows, long = [""], _font(size).getlength
    for word in text.split():
        while long(word) > width and len(word) > 1:
            fits = max(n for n in range(1, len(word)) if n == 1 or long(word[:n]) <= width)
            rows.append(word[:fits])
            word = word[fits:]
        if long(longer := f"{rows[-1]} {word}".lstrip()) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return [row for row in rows if row]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
