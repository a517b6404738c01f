"""Counts requests, measures times, and exposes them as Prometheus metrics at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from evoprune.report import Report
from evoprune_serve.work import Work

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TYPE = CONTENT_TYPE_PLAIN_0_0_4


class Metrics:
    """A server's Prometheus metrics: counters for requests and tokens, and histograms for times."""

    def __init__(self, work: Work):
        self._registry = CollectorRegistry()
        own = {"namespace": "evoprune", "registry": self._registry}
        self._requests = Counter("requests", "Requests to the API, by path and status.", ["path", "status"], **own)
        self._tokens = Counter("tokens", "Tokens: prompt, completion.", ["model", "kind"], **own)
        self._visual = Counter("visual_tokens", "Visual tokens: before pruning, kept.", ["model", "kind"], **own)
        self._encodings = Counter(
            "encodings", "Questions by whether their inputs were encoded before.", ["model", "kept"], **own
        )
        self._queue = Histogram("queue_seconds", "Time until the model begins.", buckets=SECONDS, **own)
        self._first = Histogram(
            "first_token_seconds", "Time from there to the first token.", ["model"], buckets=SECONDS, **own
        )
        self._total = Histogram(
            "answer_seconds", "Time from there to the last token.", ["model"], buckets=SECONDS, **own
        )
        Gauge("waiting", "Requests that wait.", **own).set_function(lambda: work.waiting)
        Gauge("busy", "Whether the model answers.", **own).set_function(lambda: work.busy)

    def request(self, path: str, status: int) -> None:
        self._requests.labels(path, str(status)).inc()

    def answer(self, model: str, report: Report, queue_s: float, kept: bool) -> None:
        """Record the metrics of a complete answer. `kept` is True if the encoding of an earlier question was reused."""
        self._tokens.labels(model, "prompt").inc(report.tokens.prompt or 0)
        self._tokens.labels(model, "completion").inc(report.tokens.new or 0)
        self._visual.labels(model, "before").inc(report.pruning.visual_tokens_in or 0)
        self._visual.labels(model, "kept").inc(report.pruning.visual_tokens_kept or 0)
        self._encodings.labels(model, str(kept).lower()).inc()
        self._queue.observe(queue_s)
        self._first.labels(model).observe((report.time_ms.ttft_wall or 0.0) / 1000)
        self._total.labels(model).observe((report.time_ms.total or 0.0) / 1000)

    def text(self) -> bytes:
        return generate_latest(self._registry)
