"""The words of the questions that the demo model was trained on. It answers others, too, but by chance."""

import re

WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a above appear appears are at be below big blue bottom can circle color colour count cross cyan describe diamond digit
        direction does end first flash flashes go green half happens have how in is it large left many move number of one or
        orange purple red right ring see seen shape shapes shown small square stay the there thing to top triangle vanish
        vanishes video way what where which white yellow you
        """,
    )
)


def unknown_words(question: str) -> list[str]:
    """The words of a question that no question of the training has, in order."""
    return [word for word in re.findall(r"\w+", question.lower()) if word not in WORDS]
