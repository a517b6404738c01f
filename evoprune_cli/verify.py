"""`evoprune verify`: whether this machine computes with this model what transformers computes."""

import time
import traceback
from contextlib import suppress
from functools import partial

from evoprune.errors import UsageError
from evoprune.pipeline.options import ModelOptions
from evoprune_cli import options as opt
from evoprune_cli.failures import debugging, failure
from evoprune_cli.files import check_writable, print_text, write_text
from evoprune_cli.imports import prepare
from evoprune_cli.tables import folded
from evoprune_cli.terminal import check_output, json_line, note, page_width, print_document, progress

DIFFERENCE = 7
UNLIMITED = 86_400.0

_output = partial(opt.option, "Output")

Input = opt.argument(
    str | None, "INPUT", "A video or a picture to compare on; default: a clip and a picture made by formula."
)
Quick = opt.option(None, bool, "--quick", "Only the checks that take seconds.")
TimeLimit = opt.option(
    None,
    float | None,
    "--time-limit",
    "Of the whole run, loading included: checks that would begin later are skipped.",
    metavar="SECONDS",
    min=0,
)
Output = _output(
    str | None,
    "-o",
    "--output",
    "Also write the record there, as JSON without paths, prompts and names of machines.",
    metavar="FILE.json",
)
Json = _output(bool, "--json", "The record as one JSON line instead of text.")


@opt.with_options(ModelOptions, without=("quantize", "store_quantized"))
def verify(
    *,
    path: Input = None,
    quick: Quick = False,
    time_limit: TimeLimit = None,
    options: opt.MakeOptions,
    output: Output = None,
    json: Json = False,
    quiet: opt.Quiet = False,
) -> int:
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
    check_writable(output, inputs=[path or ""])
    made, results = options(), None
    deliver = partial(_deliver, json=json, output=output)
    try:
        with progress(not quiet) as show:
            show("loading libraries")
            prepare()
            from evoprune.pipeline.loading.model import load_model
            from evoprune.profiling.time_limit import TimeLimit as Limit
            from evoprune.profiling.verify.run import subject_of
            from evoprune.profiling.verify.run import verify as run

            limit = Limit(UNLIMITED if time_limit is None else time_limit, begun=begun)
            show("loading model")
            loaded = load_model(made.model, pack=False, to_answer=True)
            with subject_of(loaded, path) as subject:
                for results in run(subject, limit, quick=quick, progress=show, failed=_failed):  # noqa: B007
                    pass
    except BaseException as problem:
        if results is not None:
            with suppress(UsageError):  # the first problem is the one to report
                deliver(results.document() | {"error": failure(problem)})
            problem.reported = True
        raise
    document = deliver(results.document() | {"error": None})
    return 0 if document["verdict"] == "held" else DIFFERENCE


def _failed(problem: Exception) -> None:
    """The traceback of what a check raised, which its line alone does not hold."""
    if debugging():
        note("".join(traceback.format_exception(problem)).rstrip())


def _deliver(document: dict, *, json: bool, output: str | None) -> dict:
    if json:
        print_document(document)
    else:
        print_text(text_of(document, page_width()))
    if output:
        write_text(output, json_line(document) + "\n")
    return document


def text_of(document: dict, width: int = 80) -> str:
    """The record as lines: what was verified, a line a check, what was measured, and the verdict."""
    model, env = document["model"], document["env"]
    about = f"{model['id'] or model['family']}, {model['dtype']}, {model['device']}: {env['device_name']}"
    versions = ", ".join(f"{name} {env[name]}" for name in ("evoprune", "torch", "transformers"))
    lines = [about, f"{versions}, {env['threads']} threads", ""]
    lines += [f"{check['state']:<8} {check['name']:<10} {check['says']}" for check in document["checks"]]
    counts = ", ".join(f"{document[state]} {state}" for state in ("held", "differs", "skipped"))
    lines += ["", f"{counts} in {document['seconds']:.0f} s: {VERDICTS[document['verdict']]}"]
    return "\n".join(_indented(lines, width)) + "\n"


VERDICTS = {
    "held": "this machine computes with this model what transformers computes",
    "differs": "something is not as it should be; -o FILE.json writes what a bug report needs",
    "skipped": "nothing was compared",
}


def _indented(lines: list[str], width: int) -> list[str]:
    """Empty lines stay; others are folded."""
    return [part for line in lines for part in (folded([line], width) if line else [""])]
