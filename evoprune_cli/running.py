"""Load models for commands, and print notes about them."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING

from evoprune.backend import Host, keep_freed_memory
from evoprune.errors import OutOfMemory
from evoprune.language import GenerationOptions
from evoprune.session import PipelineOptions
from evoprune.util import in_a_thread
from evoprune_cli.terminal import tell

if TYPE_CHECKING:
    from evoprune.model import GenerationSettings
    from evoprune.session import ModelDescription, Session

SOME_FAILED = 6  # exit code if some items failed
# Memory required to import torch and this package, in bytes. If less memory is available, no model can run.
LIBRARIES = 2**28
GREEDY = 1e-3  # sampling at a lower temperature is effectively greedy


def prepare() -> None:
    """Make the allocator reuse freed memory, and import torch if enough memory is available.

    Raises:
        OutOfMemory: If even the libraries don't fit in memory.
        ImportError: If torch can't be imported.
    """
    available = Host().available_memory()
    if available is not None and available < LIBRARIES:  # the system would silently kill this process
        figures = f"{max(0, available) >> 20} MiB are available, but the libraries alone need {LIBRARIES >> 20}"
        hint = "close other programs, or give the container more memory"
        raise OutOfMemory(f"too little memory: {figures}", hint, stage="load")
    keep_freed_memory()
    if "torch" not in sys.modules:  # an import in the main thread would delay Ctrl-C
        in_a_thread(partial(import_module, "torch"), "evoprune-import")


def load(
    options: PipelineOptions,
    show: Callable[..., None],
    quiet: bool,
    *,
    streams: bool = False,
    samples: bool = True,
    model: "ModelDescription | None" = None,
) -> "Session":
    """Load the model for `ask`, `watch`, and other commands that answer questions.

    Args:
        show: The function yielded by `terminal.progress`.
        streams: See `Session.load`.
        samples: Whether the command has the options of sampled answers, which notes about the model may name.
        model: The model description, if already known.
    """
    prepare()
    from evoprune.session import Session

    show("loading model")
    report = partial(show, "quantizing")
    session = Session.load(model or options.model, options.pruning, progress=report, streams=streams)
    note_model(session, options.generation if samples else None, quiet)
    return session


def note_model(session: "Session", asked: GenerationOptions | None, quiet: bool) -> None:
    """Print notes on stderr about ignored sampling settings in the model files, and about automatic quantization.

    `asked` is None if the command never samples.
    """
    if quiet:
        return
    loaded = session.loaded
    if asked and (flags := _sampling_flags(loaded.generation, asked)):
        tell(f"note: the model's generation_config.json has other sampling settings; to use them: {flags}")
    if loaded.description.options.quantize == "auto" and loaded.quantize != "none":
        tell(
            f"note: {loaded.quantize}, the fastest form on a CPU; --quantize none is exact, but takes about twice as long"
        )
    if loaded.quantized_file is not None:
        tell(
            f"note: the quantized weights are kept in {loaded.quantized_file.parent} for later runs; to avoid this: "
            "--no-store"
        )


def _sampling_flags(files: "GenerationSettings", asked: GenerationOptions) -> str:
    """Return the options that would apply the sampling settings in the model files, or "" if they already apply."""
    wanted = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # transformers defaults
    wanted |= {name: getattr(files, name) for name in wanted if getattr(files, name) is not None}
    others = {name: value for name, value in wanted.items() if value != getattr(asked, name)}
    greedy = asked.temperature == 0 and (wanted["top_k"] == 1 or wanted["temperature"] < GREEDY)
    if not files.do_sample or greedy:
        return ""
    return " ".join(f"--{name.replace('_', '-')} {value:g}" for name, value in others.items())
