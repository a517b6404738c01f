"""Test reports that are formatted as several lines of text, or as a single line."""

import pytest

from evoprune.report import Memory, ModelFacts, Report, TokenCounts, VideoFacts
from evoprune.statistics import stats_block, summary


def test_a_report_in_one_line():
    report = Report(question="What\nhappens?", answer="It moves." * 9, error={"message": "out of memory"})
    report.pruning.visual_tokens_in, report.pruning.visual_tokens_kept, report.time_ms.ttft_wall = 1440, 360, 1234.5
    assert repr(report).count("\n") == 0
    assert all(part in repr(report) for part in ("happens", "360 of 1,440 visual tokens", "first token 1,234 ms"))
    assert str(report).endswith("error      out of memory")
    assert str(Report()) == repr(Report()) == "<Report: empty>" and stats_block(Report(), verbose=True)
    report = Report(tokens=TokenCounts(27, 6144, 6171, 12))
    report.time_ms.ttft_wall, report.time_ms.total = 12345.6, 23456.7
    line = "6,171 tokens read (6,144 visual), 12 written; first token 12,346 ms, total 23,457 ms"
    assert summary(report) == line and len(line) < 90
    memory = Memory(weights_bytes=7 * 2**30, peak_bytes=10 * 2**30, own_bytes=2**31, mapped_bytes=2**33)
    text = str(Report(memory=memory))
    assert "peak 10.0 GiB; weights 7.0 GiB" in text
    assert "now 2.0 GiB private, and 8.0 GiB of reclaimable mapped files" in text
    report = Report(model=ModelFacts("/home/me/models/Qwen2.5-VL-3B-Instruct", dtype="bf16", device="cpu"))
    report.time_ms.total = 1234.0
    assert str(report) == "model      Qwen2.5-VL-3B-Instruct  bf16  cpu\ntotal         1,234  (the whole call)"


def test_warnings_are_told_in_words():
    facts = {"model": ModelFacts("demo"), "video": VideoFacts(path="/tmp/a.mp4")}
    report = Report(**facts, warnings=["demo_model", "unheard_of"])
    text = " ".join(str(report).split())
    assert "warning the demo models know only" in text and "its answer about a.mp4 is meaningless" in text
    assert text.endswith("warning unheard_of")


@pytest.mark.parametrize("known", ["model", "video", "tokens", "memory"])
def test_what_is_unknown_is_left_out(known):
    facts = {
        "model": ModelFacts(id="some/model", dtype="bf16", device="cuda:0"),
        "video": VideoFacts(path="a.mp4"),
        "tokens": TokenCounts(5, 10, 15),
        "memory": Memory(peak_bytes=2**30),
    }
    report = Report(**{known: facts[known]})
    report.time_ms.prefill = 12.0
    assert "None" not in str(report).replace("weights ?", "")


@pytest.mark.parametrize(
    ("part", "variable", "says"),
    [
        ((0.0, 6.0), False, "72 frames -> 6"),
        ((1.0, 4.0), False, "36 of 72 frames -> 6"),
        ((1.05, 1.5), False, "6 of 72 frames -> 6"),  # frames 12 to 17: frame 12 is on screen at the start
        ((1.0, 4.0), True, "72 frames -> 6"),
        ((1.0, 4.0), None, "72 frames -> 6"),
    ],
)
def test_the_frames_of_the_part_that_was_read(part, variable, says):
    report = Report(video=VideoFacts(path="a.mp4", duration_s=6.0, fps=12.0, variable_rate=variable, frames_total=72))
    report.sampling.start_s, report.sampling.end_s = part
    report.sampling.frames, report.sampling.resized_hw, report.time_ms.read = 6, [112, 168], 9.0
    assert next(line for line in str(report).splitlines() if line.startswith("read")).endswith(f"  {says}")
