"""`evoprune verify`: whether this machine computes with this model what transformers computes."""

import time
from dataclasses import dataclass

from evoprune.session.options import ModelOptions
from evoprune.text import counted
from evoprune_cli import options as opt
from evoprune_cli.loading import prepare
from evoprune_cli.options import flag, own
from evoprune_cli.results import check_writable, rescuing, show, write
from evoprune_cli.tables import folded
from evoprune_cli.terminal import check_output, print_traceback, progress

DIFFERENCE = 7
UNLIMITED = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Request:
    path: opt.argument(
        str | None, "INPUT", "A video or a picture to compare on; default: a clip and a picture made by formula."
    ) = None
    quick: bool = flag("--quick", "Only the checks that take seconds.")
    time_limit: float | None = own(
        "--time-limit SECONDS", "Of the whole run, loading included: checks that would begin later are skipped.", min=0
    )
    options: opt.MakeOptions
    output: str | None = own(
        "-o --output FILE.json", "Also write the record there, as JSON without paths, prompts and names of machines."
    )
    json: bool = flag("--json", "The record as one JSON line instead of text.")
    quiet: opt.Quiet = False


@opt.with_options(ModelOptions, without=("quantize", "store_quantized"), panels={"output": "Output"})
def verify(asked: Request) -> int:
    """Check that this machine computes with this model what transformers computes.

    Both sides compute with the same weights, on the same device and in the same dtype: pixels, features, positions, logits and
    answers with nothing pruned. Then what must hold below that: counts, chunks, reuse, every method. How far two results may be
    apart follows from the rounding of the dtype, which is measured. Each check held, differs or was skipped. Exit code 7: something
    differs.

    \b
    evoprune verify
    evoprune verify -m Qwen/Qwen2.5-VL-3B-Instruct --quick
    evoprune verify holiday.mp4 -m DIR --dtype bf16 -o report.json
    """
    begun = time.perf_counter()
    check_output()
    check_writable(asked.output, inputs=[asked.path or ""])
    made, results = asked.options(), None
    rescue = rescuing(lambda: results is not None, lambda error: _deliver(results, error, asked))
    with rescue, progress(not asked.quiet) as tell:
        tell("loading libraries")
        prepare()
        from evoprune.bench.profile_results import TimeLimit
        from evoprune.bench.verify.run import subject_of
        from evoprune.bench.verify.run import verify as run
        from evoprune.session.loading.model import load_model

        limit = TimeLimit(UNLIMITED if asked.time_limit is None else asked.time_limit, begun=begun)
        tell("loading model")
        loaded = load_model(made.model, pack=False, to_answer=True)
        with subject_of(loaded, asked.path) as subject:
            for results in run(subject, limit, quick=asked.quick, progress=tell, failed=print_traceback):  # noqa: B007
                pass
    _deliver(results, None, asked)
    return 0 if results.verdict == "held" else DIFFERENCE


def _deliver(results, error: dict | None, asked: Request) -> None:
    document = results.document() | {"error": error}
    show(document, text_of, asked.json)
    write(document, asked.output)


def text_of(document: dict, width: int = 80) -> str:
    """The record as lines: what was verified, a line a check, what was measured, and the verdict."""
    model, env = document["model"], document["env"]
    about = f"{model['id'] or model['family']}, {model['dtype']}, {model['device']}: {env['device_name']}"
    versions = ", ".join(f"{name} {env[name]}" for name in ("evoprune", "torch", "transformers"))
    lines = [about, f"{versions}, {counted(env['threads'], 'thread')}", ""]
    lines += [f"{check['state']:<8} {check['name']:<10} {check['says']}" for check in document["checks"]]
    counts = ", ".join(f"{document[state]} {state}" for state in ("held", "differs", "skipped"))
    lines += ["", f"{counts} in {document['seconds']:.0f} s: {VERDICTS[document['verdict']]}"]
    return "\n".join(folded(lines, width)) + "\n"


VERDICTS = {
    "held": "this machine computes with this model what transformers computes",
    "differs": "something is not as it should be; -o FILE.json writes what a bug report needs",
    "skipped": "nothing was compared",
}
