"""`evoprune verify`: checks whether evoprune produces the same results as transformers on this machine."""

import time
from dataclasses import dataclass
from typing import Any

from evoprune.session import ModelOptions
from evoprune_cli import options as opt
from evoprune_cli.delivery import check_writable, deliver_results, rescuing
from evoprune_cli.running import prepare
from evoprune_cli.terminal import check_output, print_traceback, progress
from evoprune_cli.words import check_not_model

DIFFERENCE = 7  # exit code if any check finds a difference


@dataclass(frozen=True, kw_only=True)
class VerifyArguments:
    """The arguments of `evoprune verify`."""

    path: opt.argument(
        str | None, "INPUT", "Video or image to use; default: a synthetic clip and a synthetic image."
    ) = None
    quick: opt.option(bool, "--quick", "Run only the checks that take seconds.") = False
    time_limit: opt.option(
        float | None,
        "--time-limit SECONDS",
        "Time limit of the whole run, including loading: checks that would start later are skipped.",
        min=0,
    ) = None
    options: opt.PipelineArguments
    output: opt.option(
        str | None,
        "-o --output FILE.json",
        "Also write the record to FILE as JSON, without paths, prompts and machine names.",
        opt.OUTPUT,
    ) = None
    json: opt.option(bool, "--json", "Print the record as one JSON line instead of text.", opt.OUTPUT) = False
    quiet: opt.Quiet = False


@opt.command(
    *ModelOptions.NAME,
    *ModelOptions.DEVICE,
    "load_format",
    *ModelOptions.RUNNING,
    short="quick time_limit model output json quiet",
)
def verify(given: VerifyArguments) -> int:
    """Check this machine's results against transformers.

    Both sides compute positions, features, logits and an answer without pruning, using the same weights, device and dtype. With
    pruning, the rows of each layer are counted. On a GPU, kernels and graphs are compared with plain PyTorch. How much the results
    may differ depends on the rounding error of the dtype, which is measured. Each check is reported as held, differs or skipped.
    Exit code 7: something differs, or nothing was compared.

    \b
    evoprune verify
    evoprune verify -m Qwen/Qwen2.5-VL-3B-Instruct --quick
    evoprune verify holiday.mp4 -m DIR --dtype bf16 -o report.json
    """
    begun = time.perf_counter()
    check_output()
    check_not_model(given.path, "evoprune verify -m")
    check_writable(given.output, inputs=[given.path or ""])
    pipeline = given.options.parse()
    results = None

    def deliver(error: dict[str, Any] | None = None) -> None:
        results.error = error
        deliver_results(results, "json" if given.json else "table", given.output)

    with rescuing(lambda: results is not None, deliver), progress(not given.quiet) as tell:
        tell("loading libraries")
        prepare()
        from evoprune.bench import run_checks

        checks = run_checks(
            pipeline.model,
            given.path,
            quick=given.quick,
            time_limit_s=given.time_limit,
            progress=tell,
            failed=print_traceback,
            begun=begun,
        )
        for results in checks:  # noqa: B007
            pass
    deliver()
    return 0 if results.verdict == "held" else DIFFERENCE
