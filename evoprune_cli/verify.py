"""`evoprune verify`: whether this machine computes with this model what transformers computes."""

import time

from evoprune.session.options import ModelOptions
from evoprune.util import counted
from evoprune_cli import options as opt
from evoprune_cli.running import check_writable, prepare, rescuing, show, write
from evoprune_cli.terminal import check_output, folded, print_traceback, progress

DIFFERENCE = 7  # an exit code
UNLIMITED_S = 86_400.0
VERDICTS = {
    "held": "this machine computes with this model what transformers computes",
    "differs": "something is not as it should be; -o FILE.json writes what a bug report needs",
    "skipped": "nothing was compared",
}


@opt.command(ModelOptions, short="quick time_limit model output json quiet", without=("quantize", "store_quantized"))
def verify(
    *,
    path: opt.argument(
        str | None, "INPUT", "A video or a picture to compare on; default: a clip and a picture made by formula."
    ) = None,
    quick: opt.option(bool, "--quick", "Only the checks that take seconds.") = False,
    time_limit: opt.option(
        float | None,
        "--time-limit SECONDS",
        "Of the whole run, loading included: checks that would begin later are skipped.",
        min=0,
    ) = None,
    options: opt.MakeOptions,
    output: opt.option(
        str | None,
        "-o --output FILE.json",
        "Also write the record there, as JSON without paths, prompts and names of machines.",
        opt.OUTPUT,
    ) = None,
    json: opt.option(bool, "--json", "The record as one JSON line instead of text.", opt.OUTPUT) = False,
    quiet: opt.Quiet = False,
) -> int:
    """Check the results of this machine against transformers.

    Both sides compute with the same weights, on the same device and in the same dtype: positions, features, logits and an answer with
    nothing pruned. With pruning, the rows of each layer are counted. On a GPU, kernels and graphs are compared with plain PyTorch. How
    far two results may be apart follows from the rounding of the dtype, which is measured. Each check held, differs or was skipped.
    Exit code 7: something differs.

    \b
    evoprune verify
    evoprune verify -m Qwen/Qwen2.5-VL-3B-Instruct --quick
    evoprune verify holiday.mp4 -m DIR --dtype bf16 -o report.json
    """
    begun = time.perf_counter()
    check_output()
    check_writable(output, inputs=[path or ""])
    pipeline = options()
    results = None

    def deliver(error: dict | None = None) -> None:
        document = results.document() | {"error": error}
        try:
            show(document, render, json)
        finally:  # also where nobody reads stdout
            write(document, output)

    with rescuing(lambda: results is not None, deliver), progress(not quiet) as tell:
        tell("loading libraries")
        prepare()
        from evoprune.bench.profile_results import TimeLimit
        from evoprune.bench.verify.run import subject_of
        from evoprune.bench.verify.run import verify as run
        from evoprune.session.loading.model import load_model

        seconds = UNLIMITED_S if time_limit is None else time_limit
        limit = TimeLimit(seconds, begun=begun)
        tell("loading model")
        loaded = load_model(pipeline.model, pack=False, to_answer=True)
        with subject_of(loaded, path) as subject:
            for results in run(subject, limit, quick=quick, progress=tell, failed=print_traceback):  # noqa: B007
                pass
    deliver()
    return 0 if results.verdict == "held" else DIFFERENCE


def render(document: dict, width: int = 80) -> str:
    """Return the record as lines: the model and the machine, a line for each check, the figures, and the verdict."""
    model = document["model"]
    env = document["env"]
    about = f"{model['id'] or model['family']}, {model['dtype']}, {model['device']}: {env['device_name']}"
    versions = ", ".join(f"{name} {env[name]}" for name in ("evoprune", "torch", "transformers"))
    lines = [about, f"{versions}, {counted(env['threads'], 'thread')}", ""]
    lines += [f"{check['state']:<8} {check['name']:<10} {check['says']}" for check in document["checks"]]
    counts = ", ".join(f"{document[state]} {state}" for state in ("held", "differs", "skipped"))
    lines += ["", f"{counts} in {document['seconds']:.0f} s: {VERDICTS[document['verdict']]}"]
    return "\n".join(folded(lines, width)) + "\n"
