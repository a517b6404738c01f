"""Every method of this project, and combinations of methods, on a clip with reuse, one without, and an image."""

from collections.abc import Callable, Iterator
from functools import partial

import evoprune
from tests.contract.small import Held, demo, encoded, moving, picture, steps, still, sums

COMBINED = (
    "reuse+divprune", "reuse+visionzip", "ipcv+divprune", "ipcv+cdpruner", "evoprune+fastv", "evoprune+pyramiddrop",
    "divprune+sparsevlm", "reuse+visionzip+visipruner", "tome+holitom-inner",
)  # fmt: skip
QUESTION, GIVEN = "What colour is the square?", [26, 481, 27]  # GIVEN: tokens whose logits are recorded
MADE = {"still": still, "moving": moving, "picture": picture}
INPUTS = (("still", 0.25), ("still", 0.1), ("moving", 0.25), ("moving", 0.1), ("picture", 0.25))


def asked(method: str, kind: str, budget: float) -> Held:
    """Encode an input and ask about it. Returns the units kept in each stage and the logits of given tokens."""
    qa = evoprune.VideoQA(demo(), method=method, budget=budget)
    rate = {} if kind == "picture" else {"frame_rate": 2}
    encoding = qa.encode(MADE[kind](), **rate)
    answer = encoding.ask(QUESTION, max_new_tokens=6)
    held: Held = {"answer": answer.text, "pairs": answer.report.pruning.kept_per_pair}
    for name, counts in {
        "language": answer.report.pruning.language_layers,
        "work": answer.report.pruning.language_work,
    }.items():
        if counts:
            held[name] = steps(counts)
    logits, _ = encoding.read_along(QUESTION, GIVEN)
    return held | {"logits": sums(logits)} | encoded(encoding.encoded)


def one_method(method: str) -> Held:
    return {f"{kind} {budget}": asked(method, kind, budget) for kind, budget in INPUTS}


def cases() -> Iterator[tuple[str, Callable[[], Held]]]:
    for method in (*evoprune.methods.available(plugins=False), *COMBINED):
        given = f"{method}:recipe=recipe.json" if method == "operations" else method
        yield f"method {method}", partial(one_method, given)
