"""Answer a benchmark's questions for `experiments.real`. This file is run by a Python that has lmms-eval.

    PYTHON answers.py DIR BENCHMARK

DIR/settings.json has the model, the rows, and the benchmark. All rows answer a question before the next question is asked, so a
video is read once. Answers are appended to DIR/BENCHMARK.answers.jsonl at once, and are not computed again. Then lmms-eval judges
each row's answers, and DIR/BENCHMARK.json is written. Progress is printed as lines on stdout; lmms-eval's log is on stderr.
"""

import json
import os
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager

from evoprune.errors import EvopruneError, UsageError

PROGRESS_S = 10  # seconds between two lines


class Answers:
    """A benchmark's answers, kept in a file.

    An answer is `{"row", "task", "doc", "text", "video", "error", "counts"}`. If the process was killed while writing, the
    incomplete last line is removed.
    """

    def __init__(self, path: Path):
        self._answers: dict[tuple[str, str, int], dict[str, Any]] = {}
        if path.exists():
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                path.write_bytes(whole)
            for line in whole.decode("utf-8").splitlines():
                self._keep(json.loads(line))
        self._file = path.open("a", encoding="utf-8")

    def __len__(self) -> int:
        return len(self._answers)

    def get(self, row: str, task: str, doc: int) -> dict[str, Any] | None:
        return self._answers.get((row, task, doc))

    def add(self, answer: dict[str, Any]) -> None:
        self._keep(answer)
        self._file.write(json.dumps(answer, ensure_ascii=False) + "\n")
        self._file.flush()

    def _keep(self, answer: dict[str, Any]) -> None:
        self._answers[answer["row"], answer["task"], answer["doc"]] = answer


class Rows(lmms):
    """A model that answers like one row. The first call computes every missing answer, for the other rows too.

    Args:
        settings: The contents of DIR/settings.json.
        answers: Where answers are kept.
    """

    def __init__(self, settings: dict[str, Any], answers: Answers):
        super().__init__()
        self.settings = settings
        self.answers = answers
        self.row = settings["rows"][0]
        self._models: dict[str, Any] = {}

    def generate_until(self, requests) -> list[GenerationResult]:
        self._complete(requests)
        given = [self.answers.get(self.row["name"], *_place(request)) for request in requests]
        return [GenerationResult(answer["text"]) for answer in given]

    def loglikelihood(self, requests):
        raise NotImplementedError("only tasks that generate answers can be run")

    def generate_until_multi_round(self, requests):
        raise NotImplementedError("only tasks that generate answers can be run")

    def _complete(self, requests) -> None:
        """Compute every missing answer."""
        rows = self.settings["rows"]
        total = len(requests) * len(rows)
        missing = [
            (request, row)
            for request in requests
            for row in rows
            if self.answers.get(row["name"], *_place(request)) is None
        ]
        if not missing:
            return
        done = total - len(missing)
        print(f"{done} of {total} answers", flush=True)
        begun = said = time.monotonic()
        for count, (request, row) in enumerate(missing, 1):
            self.answers.add(self._answer(request, row))
            now = time.monotonic()
            if now - said >= PROGRESS_S or count == len(missing):
                said = now
                left = (now - begun) / count * (len(missing) - count)
                print(f"{done + count} of {total} answers, about {left / 60:.0f} min left", flush=True)

    def _answer(self, request, row: dict[str, Any]) -> dict[str, Any]:
        """Answer a question. An input that cannot be read gives an empty answer, which counts as wrong."""
        task, doc = _place(request)
        _, _, doc_to_visual, _, _, split = request.args
        visuals = doc_to_visual(self.task_dict[task][split][doc])
        about = {"row": row["name"], "task": task, "doc": doc, "video": _video(visuals, task, doc)}
        model = self._model(row)
        try:
            result = next(model.answers([request]))
        except UsageError:
            raise  # the settings are wrong, so every question would fail
        except EvopruneError as error:
            return about | {"text": "", "error": str(error), "counts": None}
        return about | {"text": result.text, "error": None, "counts": result.token_counts.to_dict()}

    def _model(self, row: dict[str, Any]):
        """Return the model of a row. All rows share the weights, which are loaded when the first answer is needed."""
        name = row["name"]
        if name not in self._models:
            from lmms_eval.models import get_model

            options = {"method": row["method"], "budget": row["budget"]}
            if self._models:
                model = next(iter(self._models.values())).pruned(**options)
            else:
                print("loading the model", flush=True)
                kind = get_model("evoprune_qwen2_5_vl")
                how = self.settings["sampling"] | self.settings["loading"] | options
                model = kind(pretrained=self.settings["model"], pictures=True, **how)
            model.task_dict = self.task_dict
            self._models[name] = model
        return self._models[name]


def _place(request) -> tuple[str, int]:
    """Return a request's task and the number of its question in the sampled task."""
    *_, doc, task, _ = request.args
    return task, doc


def _video(visuals: list, task: str, doc: int) -> str:
    """Return a name of a question's first input. Questions with the same name are about the same input."""
    first = visuals[0] if visuals else None
    return Path(first).name if isinstance(first, str | os.PathLike) else f"{task}-{doc}"


def tasks_in(tree: dict) -> Iterator[Any]:
    """Yield the tasks in lmms-eval's nested dictionary of groups and tasks."""
    for entry in tree.values():
        if isinstance(entry, dict):
            yield from tasks_in(entry)
        else:
            yield entry[1] if isinstance(entry, tuple) else entry


def sample(tasks: list, count: int, seed: int) -> tuple[int, int]:
    """Keep `count` random questions in their order. Returns the number of kept questions, and the number there were."""
    sizes = [len(task.eval_docs) for task in tasks]
    total = sum(sizes)
    chosen = sorted(random.Random(seed).sample(range(total), min(count, total)))  # noqa: S311 (not for security)
    first = 0
    for task, size in zip(tasks, sizes, strict=True):
        split = task.config.test_split if task.has_test_docs() else task.config.validation_split
        own = [i - first for i in chosen if first <= i < first + size]
        for datasets in {id(each): each for each in (task.dataset, task.dataset_no_image)}.values():
            datasets[split] = datasets[split].select(own)
        first += size
    return len(chosen), total


def is_right(judged: dict[str, Any]) -> bool:
    """Return whether lmms-eval judged an answer as right, given the entries that a task's `process_results` added to a sample.

    Raises:
        ValueError: If the entries have an unknown form.
    """
    for value in judged.values():
        if isinstance(value, int | float):
            return value > 0
        if isinstance(value, dict):
            if "score" in value:
                return float(value["score"]) > 0
            said = value.get("pred_answer", value.get("parsed_pred"))
            if said is not None and "answer" in value:
                return said == value["answer"]
    raise ValueError(f"the task judges answers in an unknown form: {judged}")


LOGGED = {
    "doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "token_counts", "doc_hash", "input_media", "submission",
}  # fmt: skip


def judge(folder: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Answer the questions of a benchmark, and let lmms-eval judge them. Returns the contents of DIR/BENCHMARK.json."""
    benchmark = settings["benchmarks"][name]
    manager = TaskManager(include_path=benchmark["include"])
    tasks = [*tasks_in(manager.load_task_or_group([benchmark["task"]], "simple"))]
    asked, of = sample(tasks, settings["questions"], settings["seed"])
    tasks = [task for task in tasks if len(task.eval_docs)]
    model = Rows(settings, Answers(folder / f"{name}.answers.jsonl"))
    rows = {}
    for row in settings["rows"]:
        model.row = row
        result = simple_evaluate(
            model, tasks=[*tasks], task_manager=manager, batch_size=1, process_docs_parallel=1, bootstrap_iters=0
        )
        samples = []
        for task, logged in result["samples"].items():
            for entry in logged:
                given = model.answers.get(row["name"], task, entry["doc_id"])
                judged = {key: value for key, value in entry.items() if key not in LOGGED}
                samples.append(
                    {
                        "video": given["video"],
                        "id": f"{task}-{entry['doc_id']}",
                        "right": is_right(judged),
                        "error": given["error"],
                        "counts": given["counts"],
                    }
                )
        rows[row["name"]] = {"official": result["results"], "samples": samples}
    return {"benchmark": name, "task": benchmark["task"], "asked": asked, "of": of, "rows": rows}


def main() -> None:
    folder, name = Path(sys.argv[1]), sys.argv[2]
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    try:
        results = judge(folder, name, settings)
    except EvopruneError as error:
        sys.exit(str(error))
    made = folder / f"{name}.json.writing"
    made.write_text(json.dumps(results, default=str), encoding="utf-8")
    made.replace(folder / f"{name}.json")


if __name__ == "__main__":
    main()
