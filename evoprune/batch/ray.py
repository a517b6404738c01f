"""A batch on a Ray cluster, by Ray Data: a worker a GPU, or a node where there are none, each with a model of its own.

Parts of videos go out to the workers, records come back to the program that began it. It alone writes the output, so that its lock,
its lines and how it is resumed are the same as without Ray. Every node sees the same files under the same names, and has evoprune
installed. A worker that dies is replaced, and what it was at is done again; a part that it died of again and again is given up, and
its rows get records that say so.

Needs `pip install 'evoprune[ray]'`.
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

from evoprune.batch.rows import Part, Row
from evoprune.batch.run import Settings, answers, failure_report
from evoprune.errors import EvopruneError, UsageError, error_record, first_line
from evoprune.report import Report

INSTALL = "pip install 'evoprune[ray]'"
TRIES = 3  # of a part whose workers die


class WorkerDied(EvopruneError):
    """Nobody got to the end of it."""

    type = "worker_died"


class RemoteError(EvopruneError):
    """What went wrong in another process, as its record tells it."""

    def __init__(self, error: dict[str, Any]):
        super().__init__(error["message"], error["hint"], stage=error["stage"])
        self.exit_code, self.type = error["code"], error["type"]


def answers_on_ray(
    parts: Sequence[Part],
    settings: Settings,
    *,
    address: str | None = None,
    cache: bool = False,
    on_ready: Callable[[], None] = lambda: None,
) -> Iterator[Report]:
    """Asks it all, as `batch.answers`: a record for every row, as they are finished. No video is read ahead of the one before it.

    Args:
        address: of a cluster, such as "auto"; None for that of RAY_ADDRESS, or one on this machine, made if there is none.
        cache: whether encoded videos are kept, where each node has its cache.
        on_ready: called when there is a cluster.

    Raises:
        UsageError: Ray is not there, or no cluster. RemoteError: no worker can load the model.
    """
    left = {row.id for part in parts for row in part.rows}
    with _cluster(address) as ray:
        on_ready()
        tries = ray.remote(num_cpus=0)(Tries).remote()
        how = {"folder": os.getcwd(), "cache": cache, "tries": tries}
        for line in _lines(ray, parts, settings, how):
            if error := json.loads(line).get("broken"):
                raise RemoteError(error)
            record = Report.from_json(line)
            if record.id in left:  # what is done again may come again
                left.remove(record.id)
                yield record
    if left:
        raise EvopruneError(f"Ray has lost {len(left):,} rows", "go on with --resume")


def _lines(ray, parts: Sequence[Part], settings: Settings, how: dict[str, Any]) -> Iterator[str]:
    """What the workers make of the parts, as it comes."""
    workers, share = _workers(ray, settings.model.device)
    # A block a part: no more is lost with a worker than what it was at.
    rows = [{"part": json.dumps([asdict(row) for row in part.rows])} for part in parts]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        Worker,
        fn_constructor_args=(settings,),
        fn_constructor_kwargs=how,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(parts))),
        **share,
    )
    for block in data.iter_batches(batch_size=None, prefetch_batches=0):
        yield from map(str, block["line"])


def _workers(ray, device: str) -> tuple[int, dict[str, float]]:
    """How many there is room for, and what each is given: a GPU, or as many cores as the smallest node has."""
    gpus = int(ray.cluster_resources().get("GPU", 0))
    if device.startswith("cuda") or (device == "auto" and gpus):
        return max(1, gpus), {"num_gpus": 1}
    cores = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    least = min((count for count in cores if count), default=1)
    return max(1, sum(count // least for count in cores)), {"num_cpus": least}


class Tries:
    """Counts them for all workers, and outlives them."""

    def __init__(self):
        self._made = Counter()

    def another(self, what: str) -> int:
        self._made[what] += 1
        return self._made[what]


class Worker:
    """Has the model, and asks. Lives in a process of its own, on any node."""

    def __init__(self, settings: Settings, folder: str, cache: bool, tries):
        self._settings, self._tries, self._cache, self._broken = settings, tries, None, None
        try:
            _enter(folder)  # names of videos and models are relative to it
            self._qa = settings.load()
        except EvopruneError as problem:  # raised here, it would be tried again
            self._broken = error_record(problem)
        if cache:
            from evoprune.pipeline.cache import Cache, default_folder

            self._cache = Cache(default_folder())

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        if self._broken:
            return {"line": [json.dumps({"broken": self._broken})]}
        (text,) = batch["part"]
        part = Part(tuple(Row(**fields | {"options": tuple(fields["options"])}) for fields in json.loads(text)))
        return {"line": [record.to_json(ascii_only=True) for record in self._records(part)]}

    def _asked(self, part: Part) -> Iterator[Report]:
        return answers(self._qa, [part], self._settings, self._cache)

    def _records(self, part: Part) -> Iterator[Report]:
        import ray

        if ray.get(self._tries.another.remote(part.rows[0].id)) <= TRIES:
            return self._asked(part)
        hint = "was there too little memory? take fewer frames (--frames)"
        error = error_record(WorkerDied(f"the worker died, {TRIES} times", hint))
        return (failure_report(row, self._settings, error) for row in part.rows)


def _enter(folder: str) -> None:
    try:
        os.chdir(folder)
    except OSError as problem:
        hint = "every node must see the same files under the same names"
        raise UsageError(f"a Ray worker cannot enter {folder}: {problem.strerror}", hint) from problem


@contextmanager
def _cluster(address: str | None):
    """Ray, connected to a cluster, and as quiet as it can be."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # of a cluster that is made here: nothing is told to anybody
    try:
        import ray
        import ray.data
    except ImportError as problem:
        raise UsageError(f"--engine ray needs Ray: {first_line(problem)}", INSTALL) from problem
    # Ray tells of workers that died on stdout, and of the last ones when it ends.
    with redirect_stdout(sys.stderr):
        try:
            with _own_signals():
                ray.init(address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as problem:
            hint = "start one (ray start --head), or leave --address out"
            raise UsageError(f"no Ray cluster: {first_line(problem)}", hint) from problem
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        ray.data.DataContext.get_current().enable_progress_bars = False
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _own_signals():
    """Keeps what this program does on SIGTERM: Ray puts an exit of its own in its place."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:  # which that was
        if callable(before):
            before(signal.SIGTERM, None)
        raise
    finally:
        if signal.getsignal(signal.SIGTERM) is not before:
            signal.signal(signal.SIGTERM, before)
