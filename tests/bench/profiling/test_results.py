"""The figures made of raw samples: no model runs here."""

import json

import pytest

from evoprune.bench.profiling.results import (
    BOUND,
    FULL,
    HUGGING_FACE,
    METHOD,
    Case,
    Counts,
    Results,
    Row,
    Sample,
    Spread,
    bound_of,
    median_ratio,
)
from evoprune.report import Environment, ModelFacts

CASE = Case(8, 224, 336)


def row(kind, encode, prefill, tokens=384, budget=1.0, method=None, prune=0.0, live=1.0, case=CASE):
    """A row with a sample a round; generate takes 2 s in the first, 1 s in the second, then 3 s."""
    counts = Counts(384, int(384 * live), live, ((0, 384), (1, int(384 * live))), tokens, tokens + 30, live * 6e12)
    samples = [
        Sample(e, prune * e, p, g, peak_bytes=10**9 + i)
        for i, (e, p, g) in enumerate(zip(encode, prefill, (2.0, 1.0, 3.0), strict=False))
    ]
    return Row(kind, case, budget, method, counts, samples)


def results(*rows, rates=(1e12, 2e12, 1e12), **more):
    settings = {"new_tokens": 4, "repetitions": 3, "time_limit_s": 150.0}
    model = ModelFacts("some/model", None, "bf16", "none", "cpu", "dummy")
    env = Environment("0.1", "2.9", "5.23", "a processor", 2)
    return Results(model, 7 * 10**9, env, {}, settings, list(rows), list(rates), 1, 3, **more)


@pytest.fixture
def measured():
    """The machine is twice as slow in the second round, and the rows do not feel it alike."""
    hugging_face = row(HUGGING_FACE, (8.0, 16.0, 9.0), (4.0, 8.0, 3.0))
    full = row(FULL, (6.0, 12.0, 6.0), (3.0, 6.0, 3.0), method="none")
    method = row(METHOD, (2.0, 6.0, 3.0), (1.0, 1.0, 1.0), 38, 0.1, "evoprune", prune=0.25, live=0.5)
    return results(hugging_face, full, bound_of(full, method), method)


def test_ratios_are_the_median_of_the_rounds_own(measured):
    """12/3, 24/7, 12/4: not the ratio of the medians, 12/4."""
    method = measured.figures(measured.rows[-1])
    assert method.vs_hf == pytest.approx(24 / 7)
    assert method.encode_vs_hf == pytest.approx(3.0)  # of 4, 16/6, 3
    assert method.vs_bound == pytest.approx(13 / 7)  # of 7/3, 13/7, 7/4
    assert median_ratio([1, 10, 100], [1, 1, 50]) == 2


def test_medians_and_spread(measured):
    method = measured.figures(measured.rows[-1])
    assert method.encode == Spread(3.0, 2.0, 6.0) and method.first_token == Spread(4.0, 3.0, 7.0)
    assert method.generate_tok_s == pytest.approx(1.5)  # of 3/2, 3/1, 3/3: the first token needs no pass
    assert method.prune_share == 0.25 and method.peak_bytes == 10**9 + 2


def test_share_of_the_matrix_product_rate(measured):
    """Operations / seconds / rate, round by round."""
    assert measured.figures(measured.rows[0]).matmul_share == pytest.approx(6 / 9)  # of 6/8, 6/32, 6/9
    assert measured.figures(measured.rows[-1]).matmul_share == pytest.approx(1.0)  # of 3/2, 3/12, 3/3
    assert measured.figures(measured.rows[2]).matmul_share is None


def test_the_bound(measured):
    _, full, bound, method = measured.rows
    assert (bound.kind, bound.name, bound.budget) == (BOUND, "bound -b 0.1", 0.1)
    assert bound.counts.tokens == 38 and bound.counts.prompt == 68 and bound.counts.live_share == 1
    assert bound.seconds("encode") == full.seconds("encode") and bound.seconds("prune") == [0, 0, 0]
    assert bound.seconds("prefill") == method.seconds("prefill")
    figures = measured.figures(bound)
    assert figures.vs_bound is None and figures.vs_hf == pytest.approx(12 / 7) and figures.peak_bytes is None


def test_a_bound_belongs_to_its_budget_and_case():
    full = row(FULL, (6.0,), (3.0,))
    rows = [full]
    for budget, prefill in ((0.5, 2.0), (0.1, 1.0)):
        method = row(METHOD, (2.0,), (prefill,), budget=budget, method="evoprune")
        rows += [bound_of(full, method), method]
    elsewhere = row(FULL, (100.0,), (100.0,), case=Case(16, 224, 336))
    found = results(*rows, elsewhere, rates=(1e12,))
    assert [found.figures(r).vs_bound for r in found.rows] == [None, None, 8 / 4, None, 7 / 3, None]
    assert [found.figures(r).vs_hf for r in found.rows] == [None] * 6
    assert found.cases == [CASE, Case(16, 224, 336)] and found.of(found.cases[1]) == [elsewhere]


def test_one_new_token_has_no_rate():
    found = results(row(FULL, (6.0,), (3.0,)), rates=(1e12,))
    found.settings["new_tokens"] = 1
    assert found.figures(found.rows[0]).generate_tok_s is None


def test_why_there_are_fewer_rounds():
    assert results().remarks == []
    short = results(warmup_seconds=170.0)
    short.rounds = 1
    assert short.remarks == [
        "1 of 3 rounds: another would not have ended within 150 s",
        "the warm-up alone took 170 s, more than the time limit of 150 s",
    ]
    short.interrupted, short.warmup_seconds = True, 20.0
    assert short.remarks == ["interrupted: 1 of 3 rounds were finished"]


def test_the_document(measured):
    measured.rows.append(Row(METHOD, CASE, 0.5, "evoprune", error="out of memory in encode"))
    document = json.loads(json.dumps(measured.document(), allow_nan=False))
    assert document["schema"] == "evoprune/profile@1"
    assert document["rounds"] == {"warmup": 1, "measured": 3, "seconds": 0.0, "interrupted": False}
    assert document["matmul"] == {"flop_per_s": 10**12, "samples": [10**12, 2 * 10**12, 10**12]}
    assert document["model"]["load_format"] == "dummy" and document["env"]["threads"] == 2
    *_, method, failed = document["rows"]
    assert method["time_ms"] == {
        "encode": 3000,
        "encode_prune": 750,
        "prefill": 1000,
        "prefill_prune": 0,
        "generate": 2000,
        "ttft_model": 4000,
    }
    assert method["ratio"]["first_token_to_hugging_face"] == 3.4286
    assert method["counts"]["layers"] == [[0, 384], [1, 192]]
    assert [sample["encode"] for sample in method["samples"]] == [2000, 6000, 3000]
    assert failed.keys() == method.keys() and failed["error"] == "out of memory in encode"
    for part in ("time_ms", "rate", "ratio", "memory"):
        assert failed[part].keys() == method[part].keys() and set(failed[part].values()) == {None}
