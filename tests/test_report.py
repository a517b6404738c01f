"""Reports as lines of text, and in one line."""

import pytest

from evoprune.report import Memory, ModelFacts, Report, TokenCounts, VideoFacts, stats_block, summary


def test_an_empty_report_has_a_text():
    assert str(Report()) == repr(Report()) == "<Report: empty>" and stats_block(Report(), verbose=True)


def test_a_report_in_one_line():
    report = Report(question="What\nhappens?", answer="It moves." * 9, error={"message": "out of memory"})
    report.pruning.visual_tokens_in, report.pruning.visual_tokens_kept, report.time_ms.ttft_wall = 1440, 360, 1234.5
    assert repr(report).count("\n") == 0
    assert all(part in repr(report) for part in ("happens", "360 of 1,440 visual tokens", "first token 1,234 ms"))
    assert str(report).endswith("error      out of memory")


def test_warnings_are_told_in_words():
    report = Report(
        model=ModelFacts("demo"), video=VideoFacts(path="/tmp/a.mp4"), warnings=["demo_model", "unheard_of"]
    )
    text = " ".join(str(report).split())
    assert "warning the demo models know only" in text and "its answer about a.mp4 means nothing" in text
    assert text.endswith("warning unheard_of")


def test_a_call_of_a_hugging_face_model():
    report = Report(model=ModelFacts("/home/me/models/Qwen2.5-VL-3B-Instruct", dtype="bf16", device="cpu"))
    report.time_ms.total = 1234.0
    assert str(report).splitlines() == [
        "model      Qwen2.5-VL-3B-Instruct  bf16  cpu",
        "total         1,234  (the whole call)",
    ]


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


def test_memory_that_is_the_processs_own_is_told_from_mapped_files():
    memory = Memory(weights_bytes=7 * 2**30, peak_bytes=10 * 2**30, own_bytes=2 * 2**30, mapped_bytes=8 * 2**30)
    text = str(Report(memory=memory))
    assert "peak 10.0 GiB; weights 7.0 GiB" in text
    assert "now 2.0 GiB its own, and 8.0 GiB of mapped files that can be dropped" in text


def test_a_summary_fits_on_a_line():
    report = Report(tokens=TokenCounts(27, 6144, 6171, 12))
    report.time_ms.ttft_wall, report.time_ms.total = 12345.6, 23456.7
    line = summary(report)
    assert (
        line == "6,171 tokens read (6,144 visual), 12 written; first token 12,346 ms, total 23,457 ms"
        and len(line) < 90
    )


@pytest.mark.parametrize(
    ("part", "variable", "says"),
    [
        ((0.0, 6.0), False, "72 frames -> 6"),
        ((1.0, 4.0), False, "36 of 72 frames -> 6"),
        ((1.05, 1.5), False, "6 of 72 frames -> 6"),  # frames 12 to 17: the first is on screen at the start
        ((1.0, 4.0), True, "72 frames -> 6"),
        ((1.0, 4.0), None, "72 frames -> 6"),
    ],
)
def test_the_frames_of_the_part_that_was_read(part, variable, says):
    report = Report(video=VideoFacts(path="a.mp4", duration_s=6.0, fps=12.0, variable_rate=variable, frames_total=72))
    report.sampling.start_s, report.sampling.end_s = part
    report.sampling.frames, report.sampling.resized_hw, report.time_ms.read = 6, [112, 168], 9.0
    assert next(line for line in str(report).splitlines() if line.startswith("read")).endswith(f"  {says}")
