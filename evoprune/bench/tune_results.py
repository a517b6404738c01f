"""The results of `evoprune tune` (speed and agreement of each setting) as a table and a chart. Does not import torch."""

from dataclasses import dataclass
from typing import Any

from evoprune.bench.chart import PALE, Panel, Point, draw, lines
from evoprune.bench.results import Column, Results, failures, fitting, folded, meanings, model_line, short_name
from evoprune.report import rounded
from evoprune.util import counted

Row = dict[str, Any]


@dataclass
class TuneResults(Results):
    """The results of a tuning run, stored in a document with the schema `evoprune/tune@1`."""

    found: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return rounded(self.found)

    def table(self, width: int) -> str:
        """Return the results as text: a heading, a table with one row per setting, the verdict, and the recommended options."""
        found = self.document()
        output = heading(found, width)
        notes = [_verdict(found)]
        if found["rows"]:
            mark = found["recommended"]
            name: Column[Row] = Column("", lambda row: f"{'*' if row['name'] == mark else ' '} {row['name']}")
            drawn, columns = fitting(found["rows"], [name, *COLUMNS], width)
            output += ["", *drawn, ""]
            notes.append(meanings(columns))
        notes += [*found["notes"], *failures(found)]
        if found["error"]:
            notes.append(f"{found['error']['message']}: not everything was tried")
        output += folded(notes, width, break_on_hyphens=False)
        output += ["", *_advice(found)]
        return "\n".join(output) + "\n"

    def chart(self) -> str | None:
        """Draw a chart of agreement against time to first token, with one line per method and one for the frontier."""
        found = self.document()
        rows = found["rows"]
        if not rows:
            return None
        points: dict[str, list[Point]] = {}
        for row in rows:
            label = f"-b {row['budget']:g}" * row["frontier"]
            points.setdefault(row["method"], []).append(
                Point.percent(100 * row["first_token"], row, "agreement", label)
            )
        best = (row for row in rows if row["frontier"])
        points["frontier"] = [Point(100 * row["first_token"], 100 * row["agreement"]) for row in best]
        title = f"{short_name(found['model']['id'])}: agreement with the unpruned model against time to the first token"
        answers = counted(found["answer_tokens"], "token")
        videos = counted(found["videos"]["answered"], "video")
        asked = f"{100 * found['settings']['agree']:g}% required"
        facts = f"{answers} of answers about {videos}, 95% intervals over videos; {asked}"
        label = "first token, % of the unpruned model's"
        series = lines(points, {"frontier": PALE}, ["frontier"])
        return draw(title, facts, [Panel("", label, "tokens that agree, %", series, from_zero=False)])


def heading(document: dict[str, Any], width: int) -> list[str]:
    """Return the lines above the table: the model, the number of answers, and the duration of the run."""
    videos = document["videos"]
    answers = (
        f"{counted(document['answer_tokens'], 'token')} of answers to {counted(document['questions'], 'question')}"
    )
    about = f"{videos['answered']} of {counted(videos['wanted'], 'video')}, {document['seconds']:.0f} s"
    return folded([model_line(document["model"]), f"{answers} about {about}"], width)


COLUMNS: list[Column[Row]] = [
    Column(
        "first token",
        lambda row: f"{1 / row['first_token']:.2f}x",
        "first token: speedup over unpruned, median over videos",
    ),
    Column(
        "agree",
        lambda row: f"{100 * row['agreement']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})",
        "agree: percent of the unpruned model's answer tokens with the same first choice, estimated in the "
        "order of KL, with the 95% interval over videos",
    ),
    Column("KL", lambda row: f"{row['kl']:.3f}", "KL: mean of KL(unpruned, pruned) in nats per token", drop=5),
    Column("KL 95%", lambda row: f"{row['kl_p95']:.3f}", "KL 95%: its 95th percentile", drop=1),
    Column("tokens", lambda row: f"{100 * row['kept_share']:.0f}%", "tokens: visual tokens kept", drop=4),
    Column(
        "work",
        lambda row: f"{100 * row['live_share']:.0f}%",
        "work: share of rows computed by the vision encoder, averaged over its layers",
        drop=2,
    ),
    Column("videos", lambda row: f"{row['videos']}", "videos: number of videos it was tried on", drop=3),
]


def _advice(document: dict[str, Any]) -> list[str]:
    """Return the lines that say what to use. The last one consists of options to copy."""
    if options := document["options"]:
        return ["use these options:", _options(options)]
    goal = f"nothing faster certainly agrees on {100 * document['settings']['agree']:g}% of the tokens"
    best = [_options(row) for row in document["rows"] if row["name"] == document["best"]]
    if best:
        return [f"{goal}; the best setting:", *best, "to be certain, do not prune:", "-b full"]
    return [f"{goal}, so do not prune:", "-b full"]


def _options(setting: dict[str, Any]) -> str:
    return f"-b {setting['budget']:g} --method {setting['method']}"


def _verdict(document: dict[str, Any]) -> str:
    rows = {row["name"]: row for row in document["rows"]}
    goal = f"{100 * document['settings']['agree']:g}%"
    if name := document["recommended"]:
        gain = f"{1 / rows[name]['first_token']:.1f}x as fast, {100 * rows[name]['agreement']:.1f}% agree"
        return f"recommended: {name}, the fastest that certainly agrees on {goal} of the tokens: first token {gain}"
    if not rows:
        return "nothing was tried: the time was too short"
    row = rows[document["best"]]
    best = f"the best is {row['name']}: at least {100 * row['low']:.1f}%"
    return f"no setting certainly agrees on {goal} of the tokens; {best}"
