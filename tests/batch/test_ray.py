"""Test that a batch on a local Ray cluster of two nodes gives the same records as without Ray, even if workers are killed.

The tests are slow, and they are skipped unless Ray is installed (`pip install '.[ray]'`).
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from evoprune.batch import ray as integration
from evoprune.batch.output import Settings
from evoprune.batch.ray import TRIES, RemoteError, Worker, answers_on_ray
from evoprune.batch.rows import RowReader, Span
from evoprune.batch.run import answers
from evoprune.errors import UsageError
from evoprune.report import Report
from tests.threads import one_thread  # noqa: F401

CLIPS = sorted(map(str, Path("samples").glob("*.[mw]*")))
QUESTIONS = ["What happens?", "How many shapes are there?"]
ROWS = [
    replace(row, id=f"{row.id} {start}", start_s=start, answer="?")
    for start in (0.0, 1.0)
    for row in RowReader().pairs([*CLIPS, "gone.mp4"], QUESTIONS)
]
REASON = "Ray is not installed: pip install '.[ray]'"
SETTINGS = Settings.of(max_new_tokens=16)


def facts(record) -> tuple:
    """Return the fields that do not depend on time and place."""
    names = ("question", "answer", "finish_reason", "video", "sampling", "pruning", "tokens", "model", "error", "batch")
    return tuple(getattr(record, name) for name in names)


def test_without_ray(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="--on ray needs Ray") as caught:
        list(answers_on_ray(Span.group(ROWS), SETTINGS))
    assert "[ray]" in caught.value.hint


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two nodes with one core each."""
    pytest.importorskip("ray", reason=REASON)
    from ray.cluster_utils import Cluster

    handler = signal.getsignal(signal.SIGTERM)  # a node created here replaces the handler
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    made.add_node(num_cpus=1)
    yield made
    made.shutdown()
    signal.signal(signal.SIGTERM, handler)


def workers(cluster) -> list[int]:
    """Return process ids of the cluster's workers that have loaded a model or are about to."""
    raylets = {info.process.pid for node in cluster.list_all_nodes() for info in node.all_processes["raylet"]}
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("PPid"))
            if parent in raylets and b"MapWorker" in (status.parent / "cmdline").read_bytes():
                found.append(int(status.parent.name))
        except (OSError, StopIteration):  # the process has ended
            continue
    return found


@pytest.mark.slow
def test_the_same_records_though_workers_are_killed(cluster, capfd):
    lines = [record.to_json() for record in answers(SETTINGS.load(), Span.group(ROWS), SETTINGS)]
    here = {record.id: record for record in map(Report.from_json, lines)}
    made, killed = [], []
    with closing(answers_on_ray(Span.group(ROWS), SETTINGS, address=cluster.address)) as there:
        for record in there:
            made.append(record)
            if len(made) in (3, 8, 13):
                (victim, *_) = workers(cluster)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)
    assert len(set(killed)) == 3
    assert len(made) == len(ROWS) and {record.id for record in made} == {row.id for row in ROWS}
    for record in made:
        assert facts(record) == facts(here[record.id])
    said = capfd.readouterr()
    assert said.out == "" and "worker died" in said.err


def deadly_answers(session, spans, *how):
    if "three" in spans[0].rows[0].video:
        os.kill(os.getpid(), signal.SIGKILL)
    return answers(session, spans, *how)


class Deadly(Worker):
    """A worker that dies on one of the videos."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        integration.answers = deadly_answers  # runs in the worker's process


@pytest.mark.slow
def test_a_span_that_kills_its_workers_is_given_up(cluster, monkeypatch):
    monkeypatch.setattr(integration, "Worker", Deadly)
    rows = RowReader().pairs(CLIPS, QUESTIONS)
    made = {record.id: record for record in answers_on_ray(Span.group(rows), SETTINGS, address=cluster.address)}
    assert made.keys() == {row.id for row in rows}
    for row in rows:
        error = made[row.id].error
        if "three" in row.video:
            assert (error["type"], error["message"]) == ("worker_died", f"the worker died {TRIES} times")
        else:
            assert error is None and made[row.id].answer


@pytest.mark.slow
def test_a_model_that_no_worker_can_load(cluster):
    with pytest.raises(RemoteError, match=r"config\.json") as caught:
        list(answers_on_ray(Span.group(ROWS), Settings.of(model="samples", max_new_tokens=16), address=cluster.address))
    assert (caught.value.exit_code, caught.value.type, caught.value.stage) == (4, "model", "load") and caught.value.hint


def test_no_cluster(monkeypatch):
    ray = pytest.importorskip("ray", reason=REASON)

    def init(*_, **__):
        raise ConnectionError("Could not find any running Ray instance.\nMore of it.")

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(UsageError, match=r"(?m)no Ray cluster: Could not find any running Ray instance\.$") as caught:
        list(answers_on_ray(Span.group(ROWS), SETTINGS, address="auto"))
    assert "ray start" in caught.value.hint


@pytest.mark.parametrize("when", ["in init", "later"])
def test_sigterm_stays_ours(monkeypatch, when):
    ray = pytest.importorskip("ray", reason=REASON)

    def init(*_, **__):
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        if when == "in init":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ray, "init", init)
    before = signal.signal(signal.SIGTERM, lambda *_: 1 / 0)
    try:
        with pytest.raises(ZeroDivisionError):
            for _ in answers_on_ray(Span.group(ROWS), SETTINGS, on_ready=lambda: signal.raise_signal(signal.SIGTERM)):
                pass
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143)])
def test_signals(cluster, tmp_path, sent, code):
    out = tmp_path / "out.jsonl"
    asked = [{"video": os.path.abspath(clip), "question": f"What is {n}?"} for clip in CLIPS for n in range(40)]
    rows = "".join(json.dumps(row) + "\n" for row in asked)
    (tmp_path / "rows.jsonl").write_text(rows)
    args = [
        "batch",
        "--from",
        tmp_path / "rows.jsonl",
        "-m",
        "demo",
        "-o",
        out,
        "--on",
        "ray",
        "--address",
        cluster.address,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "evoprune_cli", *map(str, args)],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while process.poll() is None and not (out.exists() and out.read_bytes()):
        time.sleep(0.05)
    process.send_signal(sent)
    _, err = process.communicate(timeout=300)
    content, lines = out.read_bytes(), out.read_bytes().count(b"\n")
    assert process.returncode == code, err.decode()
    assert content.endswith(b"\n") and all(json.loads(line)["error"] is None for line in content.splitlines())
    assert f"{lines} of {len(asked)} rows answered" in err.decode()


@pytest.mark.slow
def test_the_command(cluster, tmp_path):
    """The output can be resumed here without Ray, and stdout contains only records."""

    def run(*args) -> subprocess.CompletedProcess:
        line = ["batch", *CLIPS, "-Q", QUESTIONS[0], "-m", "demo", "-n", "4", *map(str, args)]
        return subprocess.run([sys.executable, "-m", "evoprune_cli", *line], capture_output=True, text=True)

    out, on_ray = tmp_path / "out.jsonl", ("--on", "ray", "--address", cluster.address)
    done = run(*on_ray, "-o", out)
    assert (done.returncode, done.stdout) == (0, "") and f"{len(CLIPS)} of {len(CLIPS)} rows answered: " in done.stderr
    assert "Traceback" not in done.stderr
    made = [json.loads(line)["video"]["path"] for line in out.read_text().splitlines()]
    assert sorted(made) == CLIPS
    done = run("-Q", QUESTIONS[1], "-o", out, "--resume")
    assert done.returncode == 0 and f"{len(CLIPS)} of them earlier" in done.stderr


@pytest.mark.slow
def test_stopping_early_lets_go_of_the_cluster(cluster):
    import ray

    before = set(threading.enumerate())
    with closing(answers_on_ray(Span.group(ROWS), SETTINGS, address=cluster.address)) as made:
        next(made)
    assert not ray.is_initialized()
    until = time.monotonic() + 30
    while workers(cluster) and time.monotonic() < until:
        time.sleep(0.1)
    assert workers(cluster) == [] and not [
        t for t in threading.enumerate() if t.is_alive() and t not in before and not t.daemon
    ]
