"""Options that several commands share, declared once."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.model.precision import AUTO_THREADS, DTYPE_NAMES, LOAD_FORMATS, QUANTIZE
from evoprune.pruning.budget import PRESETS, TUNED, parse_budget, parse_budget_or_name
from evoprune_cli import completion

if TYPE_CHECKING:
    from evoprune.pipeline.options import PipelineOptions

_PRESETS = ", ".join(f"{name} ({value:g})" for name, value in PRESETS.items())


def _option(panel: str, *names: str, **settings):
    return typer.Option(*names, rich_help_panel=panel, **settings)


_MODEL, _PRUNING, _SAMPLING, _GENERATION, _OUTPUT = "Model", "Pruning", "Sampling", "Generation", "Output"
_NAMED, _NAME = ("-m", "--model"), {"envvar": "EVOPRUNE_MODEL", **completion.MODEL}

Model = Annotated[
    str,
    _option(_MODEL, *_NAMED, **_NAME, help="Hub id, local folder, or a bundled tiny model: demo, demo-scenes."),
]
Revision = Annotated[
    str | None, _option(_MODEL, "--revision", help="Branch, tag or commit of a hub id.", show_default=False)
]
Device = Annotated[
    str,
    _option(
        _MODEL,
        "--device",
        **completion.one_of("auto", "cpu", "cuda[:N]"),
        help="Device to run on; auto is CUDA if there is any.",
    ),
]
Dtype = Annotated[
    str,
    _option(
        _MODEL,
        "--dtype",
        **completion.one_of("auto", *DTYPE_NAMES),
        help="auto: bf16 where the hardware has it; demo models fp32.",
    ),
]
Quantize = Annotated[
    str,
    _option(
        _MODEL,
        "--quantize",
        **completion.one_of(*QUANTIZE),
        help="Weights of the language model while it generates, on a CPU: fewer bits are faster and less exact.",
    ),
]
LoadFormat = Annotated[
    str,
    _option(
        _MODEL,
        "--load-format",
        **completion.one_of(*LOAD_FORMATS),
        help="auto reads the weights. dummy makes random ones of the same dimensions: times and counts are right, answers mean "
        "nothing. It needs a folder with config.json and a tokenizer.",
    ),
]
Threads = Annotated[
    str,
    _option(
        _MODEL,
        "--threads",
        envvar="EVOPRUNE_THREADS",
        **completion.one_of(AUTO_THREADS, "N"),
        help="Threads on the CPU; auto: by the model's size, at most the cores that this process may use, or OMP_NUM_THREADS.",
    ),
]
Offline = Annotated[bool, _option(_MODEL, "--offline", help="Never use the network.")]

Budget = Annotated[
    str,
    _option(
        _PRUNING,
        "-b",
        "--budget",
        envvar="EVOPRUNE_BUDGET",
        **completion.BUDGET,
        help=f"Share of visual tokens kept: 0.1 or 10%, or {_PRESETS}. -b full prunes nothing; -b auto to let the content "
        "decide, or auto:inflection by a method's scores; -b tuned for what was tuned for the model, method included.",
    ),
]
MethodName = Annotated[
    str,
    _option(
        _PRUNING,
        "--method",
        **completion.METHOD,
        help=f"How tokens are pruned: {', '.join(methods.available())}. NAME:SETTING=VALUE for its settings; "
        "reuse+NAME to encode changed units alone; ipcv+NAME to compute a third of the rows in most layers; NAME+fastv to drop "
        "tokens inside the language model, too.",
    ),
]
SWEEP = "Sweep (lists by commas or repetition)"
Budgets = Annotated[
    list[str] | None,
    _option(
        SWEEP,
        "-b",
        "--budget",
        envvar="EVOPRUNE_BUDGET",
        **completion.BUDGETS,
        help="Shares of visual tokens kept, or presets; only in eval auto, auto:inflection, tuned; "
        f"default: {','.join(list(PRESETS)[1:])}. Full is always there.",
        show_default=False,
    ),
]
Methods = Annotated[
    list[str] | None,
    _option(
        SWEEP,
        "--method",
        **completion.METHODS,
        help=f"Of {', '.join(methods.available())}; default: {methods.DEFAULT}. NAME:SETTING=VALUE for its settings; "
        "reuse+NAME, ipcv+NAME and NAME+fastv.",
        show_default=False,
    ),
]
MethodArg = Annotated[
    list[str] | None,
    _option(
        _PRUNING,
        "--method-arg",
        metavar="NAME=VALUE",
        help="A setting of the method; repeatable.",
        show_default=False,
    ),
]
Seed = Annotated[
    int, _option(_PRUNING, "--seed", metavar="<int>", help="Seed of everything random.", min=0, max=2**63 - 1)
]

Fps = Annotated[
    float | None,
    _option(_SAMPLING, "--fps", help="Frames a second to look at; default: the model's rate.", show_default=False),
]
Frames = Annotated[
    int | None,
    _option(
        _SAMPLING,
        "--frames",
        help="Number of frames to look at, instead of --fps; odd numbers round up.",
        show_default=False,
    ),
]
MaxFrames = Annotated[
    int | None,
    _option(
        _SAMPLING, "--max-frames", help="At most this many frames; default: the model's limit.", show_default=False
    ),
]
MaxVisualTokens = Annotated[
    int | None,
    _option(
        _SAMPLING,
        "--max-visual-tokens",
        help="Limit before pruning: above it, frames become smaller, then fewer; default: 24576, for real models on a CPU 4096.",
        show_default=False,
    ),
]
Start = Annotated[
    str,
    _option(
        _SAMPLING,
        "--start",
        metavar="TIME",
        help="Where to start: 90, 1:30, 01:30:00 or 1m30s; -5: 5 s before the end.",
    ),
]
End = Annotated[
    str | None,
    _option(
        _SAMPLING, "--end", metavar="TIME", help="Where to stop, in the same way; default: the end.", show_default=False
    ),
]
_DECODERS = completion.one_of("auto", "pyav", "decord")
Decoder = Annotated[
    str, _option(_SAMPLING, "--decoder", **_DECODERS, help="Library that reads the video; auto is pyav.")
]
Subtitles = Annotated[
    str,
    _option(
        _SAMPLING,
        "--subtitles",
        **completion.one_of("none", "auto", "FILE"),
        help="What is said, for the prompt. auto: a file beside the video, else a text track in it. FILE: SRT, WebVTT, ASS, or a "
        "video with a text track.",
    ),
]
MaxSubtitleTokens = Annotated[
    int,
    _option(
        _SAMPLING,
        "--max-subtitle-tokens",
        help="Limit of the subtitles: above it, lines are left out, evenly over all.",
    ),
]

MaxNewTokens = Annotated[int, _option(_GENERATION, "-n", "--max-new-tokens", help="Longest answer, in tokens.")]
Temperature = Annotated[float, _option(_GENERATION, "-t", "--temperature", help="0 is greedy.")]
TopP = Annotated[float, _option(_GENERATION, "--top-p", help="Nucleus sampling.")]
System = Annotated[
    str | None, _option(_GENERATION, "-s", "--system", metavar="TEXT", help="A system prompt.", show_default=False)
]

Inputs = Annotated[
    list[str],
    typer.Argument(
        metavar="INPUT",
        help="Videos and pictures (files, folders of frames, or - for stdin), then the question, quoted. "
        "Without a question or -Q, the question is read from stdin; otherwise only - reads it.",
        show_default=False,
    ),
]
MoreQuestions = Annotated[
    list[str] | None,
    typer.Option(
        "-Q",
        "--question",
        metavar="TEXT",
        help="A question; repeatable. All share one encoding.",
        show_default=False,
    ),
]
Interactive = Annotated[
    bool,
    typer.Option(
        "-i",
        "--interactive",
        help="Ask further questions at a prompt: q or Ctrl-D ends it, Ctrl-C stops an answer. Needs a terminal, but no question.",
    ),
]
Compare = Annotated[
    bool,
    typer.Option(
        "--compare",
        help="Also answer with nothing pruned, and print both; with --json in the field `compare` of the same line.",
    ),
]

InspectedModel = Annotated[
    str | None,
    _option(
        _MODEL,
        *_NAMED,
        **_NAME,
        help="Hub id, local folder, demo or demo-scenes: what it needs. With a video the default is demo.",
        show_default=False,
    ),
]
Json = Annotated[bool, _option(_OUTPUT, "--json", help="One JSON line a question on stdout, instead of text.")]
Stats = Annotated[
    bool | None,
    _option(
        _OUTPUT,
        "--stats/--no-stats",
        help="Stage times and token counts on stderr; default: unless --json or -q, in one line from the second question on.",
        show_default=False,
    ),
]
Quiet = Annotated[bool, _option(_OUTPUT, "-q", "--quiet", help="No progress, notes or stats; warnings remain.")]
Verbose = Annotated[
    bool, _option(_OUTPUT, "-v", "--verbose", help="Also print rows of every layer, settings, versions.")
]
Cache = Annotated[
    bool,
    _option(
        _OUTPUT,
        "--cache/--no-cache",
        help="Keep encoded videos on disk (at most 2 GiB) and reuse them.  [env var: EVOPRUNE_CACHE_DIR]",
    ),
]
Debug = Annotated[bool, _option(_OUTPUT, "--debug", help="Show the traceback of an error.  [env var: EVOPRUNE_DEBUG]")]


def pipeline_options(given: Mapping[str, Any]) -> "PipelineOptions":
    """The pipeline's options, made of a command's arguments by their names (`locals()`); other arguments are ignored.

    Raises:
        UsageError: a bad value.
    """
    from dataclasses import fields

    from evoprune.pipeline import options
    from evoprune.video.sampling import parse_time

    given = {
        **given,
        "method_args": settings(given.get("method_arg")),
        "start_s": parse_time(given["start"]),
        "end_s": parse_time(given["end"]) if given["end"] else None,
    }
    known = {f.name for kind in options.PipelineOptions.KINDS for f in fields(kind)}
    return options.PipelineOptions.of(**{name: value for name, value in given.items() if name in known})


def settings(texts: list[str] | None) -> dict[str, str]:
    """A method's settings, of NAME=VALUE texts.

    Raises:
        UsageError: a text without an equals sign or a name.
    """
    made = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise UsageError(f"--method-arg {text!r} is not NAME=VALUE", "for example --method-arg alpha=2")
        made[name] = value
    return made


def listed(texts: list[str] | None) -> list[str]:
    """A list given by commas or by repeating the option."""
    return [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]


def sweep(budgets: list[str] | None, names: list[str] | None, args: list[str] | None, *, named: bool = False) -> dict:
    """What `profile` and `eval` go through: `budgets`, `methods` and `method_args`, each budget and method once.

    Args:
        named: whether budgets of "auto", "auto:inflection" and "tuned" are allowed; "tuned", alone, holds the method too.

    Raises:
        UsageError: a bad budget, no such method, or a setting that is not NAME=VALUE.
    """
    from evoprune.pipeline.options import check_tuned

    wanted = tuple(dict.fromkeys(listed(names) or [methods.DEFAULT]))
    for name in wanted:
        methods.check(name)
    texts, made = listed(budgets) or list(PRESETS)[1:], settings(args)
    if named and set(texts) == {TUNED}:
        for name in wanted:
            check_tuned(TUNED, name, made)
    shares = map(parse_budget_or_name if named else parse_budget, texts)
    return {"budgets": tuple(dict.fromkeys(shares)), "methods": wanted, "method_args": made}
