"""Batches on a Ray cluster, with one worker per GPU, or one per node if there are no GPUs.

The program that starts the batch also writes the output. If a worker dies, it is replaced and its span is retried, for up to three
attempts in total.
"""

import json
import logging
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from typing import Any

from evoprune.backend import DeviceName
from evoprune.batch.output import Settings
from evoprune.batch.rows import Row, Span
from evoprune.batch.run import answers
from evoprune.errors import EvopruneError, UsageError, error_record, first_line
from evoprune.language import Turn
from evoprune.report import Report
from evoprune.util import install_hint

TRIES = 3  # maximum number of attempts per span


class WorkerDied(EvopruneError):
    """Raised if a worker died in every attempt at a span."""

    type = "worker_died"


class RemoteError(EvopruneError):
    """An error from another process, rebuilt from its JSON record."""

    def __init__(self, error: dict[str, Any]):
        super().__init__(error["message"], error["hint"], stage=error["stage"])
        self.exit_code = error["code"]
        self.type = error["type"]


def answers_on_ray(
    spans: Sequence[Span],
    settings: Settings,
    *,
    address: str | None = None,
    cache: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> Iterator[Report]:
    """Yield a record for each row as soon as a worker has answered it. Unlike `batch.run.answers`, this does not prefetch inputs.

    Args:
        spans: The rows, in groups that share an encoding.
        settings: The options of the batch.
        address: The cluster address, such as "auto". None uses the address from RAY_ADDRESS or, if that variable is not set, starts
            a new cluster on this machine.
        cache: Whether each node uses its own local disk cache.
        on_ready: Called once the program has connected to the cluster.

    Raises:
        UsageError: If Ray is not installed, or no cluster can be reached.
        RemoteError: If the workers cannot load the model.
    """
    left = {row.id for span in spans for row in span.rows}
    with _cluster(address) as ray:
        on_ready()
        where = {"folder": os.getcwd(), "cache": cache, "tries": ray.remote(num_cpus=0)(Tries).remote()}
        for line in _lines(ray, spans, settings, where):
            if error := json.loads(line).get("broken"):
                raise RemoteError(error)
            record = Report.from_json(line)
            if record.id in left:  # if a span is retried, some records arrive twice
                left.remove(record.id)
                yield record
    if left:
        raise EvopruneError(f"Ray lost {len(left):,} rows", "continue with --resume")


def _lines(ray, spans: Sequence[Span], settings: Settings, where: dict[str, Any]) -> Iterator[str]:
    """Answer the spans on the cluster, and yield the workers' records as JSON lines in order of arrival."""
    workers, share = _workers(ray, settings.model.device)
    # Use one block per span, so that only the current span is lost if a worker dies.
    rows = [{"span": json.dumps([asdict(row) for row in span.rows])} for span in spans]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=(settings,),
        fn_constructor_kwargs=where,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(spans))),
        **share,
    )
    for block in data.iter_batches(batch_size=None, prefetch_batches=0):
        yield from map(str, block["line"])


def _workers(ray, device: str) -> tuple[int, dict[str, float]]:
    """Return the number of workers and the resources per worker: one GPU, or the number of cores on the smallest node."""
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return DeviceName(device).cluster_share(int(ray.cluster_resources().get("GPU", 0)), cores)


class Tries:
    """Counts the attempts to answer each span. It runs as a separate Ray actor, so it survives when workers die."""

    def __init__(self):
        self._made = Counter()

    def another(self, what: str) -> int:
        self._made[what] += 1
        return self._made[what]


class Worker:
    """A Ray worker that loads the model and answers spans. Each worker is a separate process on one of the nodes."""

    def __init__(self, settings: Settings, folder: str, cache: bool, tries):
        self._settings = settings
        self._tries = tries
        self._cache = None
        self._broken = None
        try:
            _enter(folder)  # the paths of videos and models are relative to this folder
            self._session = settings.load()
        except EvopruneError as problem:  # if the constructor raised an error, Ray would retry it
            self._broken = error_record(problem)
        if cache:
            from evoprune.session import Cache

            self._cache = Cache()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        if self._broken:
            return {"line": [json.dumps({"broken": self._broken})]}
        (text,) = batch["span"]
        span = Span(tuple(_row(fields) for fields in json.loads(text)))
        return {"line": [record.to_json(ascii_only=True) for record in self._records(span)]}

    def _records(self, span: Span) -> Iterator[Report]:
        import ray

        if ray.get(self._tries.another.remote(span.rows[0].id)) <= TRIES:
            return answers(self._session, [span], self._settings, self._cache)
        hint = "it may have run out of memory: use fewer frames (--frames)"
        error = error_record(WorkerDied(f"the worker died {TRIES} times", hint))
        return (self._settings.failed(row, error) for row in span.rows)


def _row(fields: dict[str, Any]) -> Row:
    """Rebuild a row from its JSON representation, in which tuples have become lists."""
    lists = {name: tuple(fields[name]) for name in ("inputs", "paths", "options", "groups")}
    return Row(**fields | lists | {"earlier": tuple(Turn(**turn) for turn in fields["earlier"])})


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as problem:
        hint = "every node must have the same files at the same paths"
        raise UsageError(f"a Ray worker cannot enter {folder}: {problem.strerror}", hint) from problem


@contextmanager
def _cluster(address: str | None):
    """Connect to a Ray cluster, and keep Ray's own output away from stdout. Yields the Ray module."""
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise UsageError(f"--on ray needs Ray: {first_line(problem)}", install_hint("ray")) from problem
    # Ray prints messages about dead workers to stdout, even while it shuts down.
    with redirect_stdout(sys.stderr):
        try:
            with _process_state_kept():
                # Without an address, Ray would look for the latest cluster on this machine and hang if it no longer exists.
                where = address or os.environ.get("RAY_ADDRESS") or "local"
                ray.init(where, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            hint = "start one (ray start --head), or leave out --address"
            raise UsageError(f"no Ray cluster: {first_line(problem)}", hint) from problem
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _process_state_kept():
    """Undo changes that Ray makes to this process: restore the SIGTERM handler and the environment.

    Within the context, Ray's usage reporting is disabled for new clusters unless RAY_USAGE_STATS_ENABLED is set.
    """
    handler = signal.getsignal(signal.SIGTERM)
    variable = "RAY_USAGE_STATS_ENABLED"
    given = variable in os.environ
    os.environ.setdefault(variable, "0")
    try:
        yield
    except SystemExit:  # raised by Ray's own handler
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        if not given:
            del os.environ[variable]
        if signal.getsignal(signal.SIGTERM) is not handler:
            signal.signal(signal.SIGTERM, handler)
