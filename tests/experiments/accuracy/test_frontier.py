"""experiments.accuracy.frontier: kept share of the full model's right answers, by set and group, and the worst set."""

from experiments.accuracy.frontier import FULL, METHOD, table


def sample(video: int, right: bool, row: str = FULL, budget: float | str = 1.0, group: str = "video") -> dict:
    method = "none" if row == FULL else "evoprune"
    about = {"video": f"clip-{video}", "id": "0", "groups": [group], "right": right}
    return about | {"row": row, "method": method, "budget": budget}


def samples(wrong: int) -> list[dict]:
    """Return answers about 20 clips, every fourth a picture. The full model gets 16 right, the pruned one `wrong` fewer."""
    groups = ["picture" if video % 4 == 0 else "video" for video in range(20)]
    full = [sample(video, video < 16, group=group) for video, group in enumerate(groups)]
    return full + [sample(v, wrong <= v < 16, METHOD, "fast", group) for v, group in enumerate(groups)]


def test_the_table_has_every_set_and_group_and_the_worst():
    head, _, row = table({"scenes": samples(4), "shapes": samples(2)})
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert [cell.strip() for cell in head.strip("| ").split(" | ")][:3] == ["worst", "scenes", "scenes: picture"]
    assert cells[:2] == ["`evoprune -b fast`", "75.0"] and cells[2].startswith("75.0, -20.0 ")
    assert cells[3:7] == ["75.0", "75.0", "", ""] and cells[7].startswith("87.5, -10.0 ")
