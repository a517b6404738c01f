"""How commands load a model: enough memory, memory that is kept, no garbage collections in imports, and notes about the model."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from evoprune.backend.limits import check_libraries, keep_freed_memory
from evoprune.session.options import GenerationOptions, PipelineOptions
from evoprune_cli.terminal import tell

if TYPE_CHECKING:
    from evoprune.model.config import GenerationSettings
    from evoprune.session.engine import Engine
    from evoprune.video_qa import VideoQA

LARGE_MODEL = 2**30  # bytes of weights
GREEDY = 1e-3  # temperatures below it change nothing that could be seen


def prepare() -> None:
    """To be called before torch is imported. Raises OutOfMemory: there is not even memory for the libraries."""
    check_libraries()
    keep_freed_memory()


@contextmanager
def without_collections() -> Iterator[None]:
    """Imports inside are an eighth faster: Python does not search a hundred thousand new objects for garbage again and again.

    Nothing that is imported is ever garbage, so later collections leave it out too.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def load(options: PipelineOptions, show: Callable[..., None], quiet: bool) -> "VideoQA":
    """The model of `ask` and `watch`. `show`: of `terminal.progress`."""
    prepare()
    with without_collections():
        from evoprune.video_qa import load_qa

    show("loading model")
    qa = load_qa(options.model, options.pruning, progress=partial(show, "quantizing"))
    note_model(qa.engine, options.generation, quiet)
    return qa


def note_model(engine: "Engine", generation: GenerationOptions, quiet: bool) -> None:
    """Says on stderr what a model's files ask for and is not done, what would make it faster."""
    if not quiet:
        note_draws(engine.loaded.generation, generation)
        note_bits(engine)


def note_draws(files: "GenerationSettings", asked: GenerationOptions) -> None:
    """Says on stderr that a model's generation_config.json has tokens drawn, where they are not drawn in that way."""
    wanted = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}  # what transformers takes for those that are not there
    wanted |= {name: getattr(files, name) for name in wanted if getattr(files, name) is not None}
    greedy = asked.temperature == 0 and (wanted["top_k"] == 1 or wanted["temperature"] < GREEDY)
    if not files.do_sample or greedy or wanted == {name: getattr(asked, name) for name in wanted}:
        return
    flags = " ".join(
        f"--{name.replace('_', '-')} {value:g}" for name, value in wanted.items() if value != getattr(asked, name)
    )
    tell(f"note: the model's generation_config.json has tokens drawn otherwise than here; as it says: {flags}")


def note_bits(engine: "Engine") -> None:
    """Says on stderr that 8 bits would be faster, where a large model computes in fp32 because the CPU has no bf16 products."""
    loaded = engine.loaded
    usual = (loaded.dtype, loaded.device, loaded.quantize) == ("fp32", "cpu", "none")
    if not usual or loaded.weights_bytes < LARGE_MODEL:
        return
    from evoprune.cpu.quantize import kinds

    if "int8" in kinds(loaded.model.device):
        gain = "about twice as fast, less exact, and takes a third of the memory"
        tell(f"note: fp32 on this CPU; --quantize int8 is {gain}")
