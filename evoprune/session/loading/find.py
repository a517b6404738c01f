"""From the name of a model to where it is and what its files say: the hub, its cache, a folder; config, weights, settings.

Only safetensors are read, and no code that comes with a model is run.
"""

import hashlib
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import Any

import torch

from evoprune.backend.cpu.linear import can_pack
from evoprune.backend.cpu.quantize import check as check_quantize
from evoprune.backend.cpu.quantize import kinds, saved_bytes
from evoprune.backend.devices import default_dtype, pick_device
from evoprune.backend.weights import are_mapped, are_widened
from evoprune.bundled import DEMOS, Demo, demo_in
from evoprune.errors import ModelError, ModelWarning, UsageError, first_line
from evoprune.language.prompt import Tokenizer
from evoprune.model.config import (
    TEXT,
    Config,
    GenerationSettings,
    Rule,
    check_fetched,
    pick,
    section,
)
from evoprune.model.cost import parameter_count, shortage
from evoprune.model.weights import Tower, empty, name_in_memory
from evoprune.session.loading.files import (
    ADAPTER,
    BUNDLED_CONFIGS,
    MERGE,
    MODEL_HINT,
    cached_folder,
    cached_id,
    default_max_visual_tokens,
    input_limits,
    is_bundled,
    is_id,
    local_folder,
    near_hint,
    nearest_id,
    read_config,
    read_json,
    valid,
    warn_of_unused,
)
from evoprune.session.options import NATIVE, TRANSFORMERS, ModelOptions
from evoprune.util import file_stats, listed, open_safetensors, size
from evoprune.video.plan import InputLimits

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors"]  # of a model on the hub
PACKAGES = {  # that transformers needs for a method of quantisation, besides accelerate
    "awq": ["gptqmodel"],
    "gptq": ["gptqmodel", "optimum"],
    "bitsandbytes": ["bitsandbytes"],
    "compressed-tensors": ["compressed-tensors"],
    "hqq": ["hqq"],
    "quanto": ["optimum-quanto"],
    "torchao": ["torchao"],
}
BITS = "load_in_8bit", "load_in_4bit"  # which mean bitsandbytes, whatever method is named, as in transformers
PLAIN = ("BF16", "F16", "F32", "F64")  # dtypes of safetensors whose numbers mean what they say: others have scales
HEAD = "lm_head.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
HUB_SECONDS = 5.0
# Settings of transformers' `generate` that change answers and are not done here, and what they are where they change nothing.
NOT_DONE = dict.fromkeys(
    ("bad_words_ids", "begin_suppress_tokens", "encoder_no_repeat_ngram_size", "epsilon_cutoff", "eta_cutoff", "min_length",
     "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id", "min_new_tokens", "min_p", "penalty_alpha",
     "no_repeat_ngram_size", "sequence_bias", "stop_strings", "suppress_tokens", "top_h", "constraints", "dola_layers",
     "force_words_ids", "watermarking_config"), 0
) | dict.fromkeys(("encoder_repetition_penalty", "guidance_scale", "num_beams", "typical_p"), 1)  # fmt: skip
BELONG = "config.json and the weights must belong together; get the model again"
# How names of tensors begin that other programs wrote, and what to do about it.
ELSEWHERE = {
    "base_model.model.": f"the weights are those of a model under an adapter; {MERGE}",
    "module.": "the weights are those of a DistributedDataParallel or DataParallel around the model; save its `module`",
    "_orig_mod.": "the weights are those of a model under torch.compile; save its `_orig_mod`",
    "vision_tower.": "the weights are a conversion, as of MLX; take the original checkpoint",
    "language_model.model.": "the weights are a conversion, as of MLX; take the original checkpoint",
}
_CONVERTED = re.compile(r"(^|[-_./])(gguf|mlx)($|[-_.])", re.IGNORECASE)
_ORIGINAL = re.compile(r"qwen((2|2\.5|3)-vl|3\.\d)-[\d.]+b(-a\d+b)?(-instruct|-thinking)?", re.IGNORECASE)


@dataclass(frozen=True)
class FoundModel:
    """Made by `find_model`, `look_up` and `describe_model`."""

    options: ModelOptions  # which model, and how it is to be loaded
    device: torch.device
    folder: Path | None  # its files; None for a bundled config
    commit: str | None  # on the hub, None for anything local
    config: Config
    quantization: str | None = None  # the method by which the checkpoint is quantised, such as "awq"

    @property
    def id(self) -> str:
        return self.options.model

    @property
    def random(self) -> bool:
        """Whether its weights are made, not read."""
        return self.options.load_format == "dummy"

    @property
    def demo(self) -> Demo | None:
        return demo_in(self.folder)

    @property
    def dtype(self) -> str:
        """As the options say; for "auto" bf16 if the device multiplies it in hardware, of a demo fp32."""
        if self.options.dtype != "auto":
            return self.options.dtype
        return "fp32" if self.demo else default_dtype(self.device)

    @property
    def max_visual_tokens(self) -> int:
        """The limit before pruning where none is given."""
        return default_max_visual_tokens(None if self.random else self.folder, str(self.device))

    @property
    def native(self) -> bool:
        """Whether this project runs the language model itself."""
        return self.can_be_native and self.options.engine != TRANSFORMERS

    @property
    def to_be_native(self) -> str:
        """What a user is to do so that this project runs the language model; a hint where it does not."""
        if self.can_be_native:
            return "leave the engine out"
        return "take a checkpoint that evoprune runs itself, such as Qwen/Qwen3-VL-4B-Instruct"

    @property
    def can_be_native(self) -> bool:
        """Whether this project could run the language model."""
        return self.config.vision_config.traits.native and self.quantization is None

    @property
    def can_be_quantized(self) -> bool:
        """Whether `quantize` applies: experts are no linear layers."""
        return self.quantization is None and self.config.text_config.experts is None

    @cached_property
    def limits(self) -> dict[str, InputLimits]:
        """Of videos and of pictures. Warns of settings of the processors that are not followed."""
        limits = input_limits(self.folder, self.config.vision_config)
        if self.folder is not None:
            warn_of_unused(self.folder)
        return limits

    @cached_property
    def tower(self) -> Tower:
        """The names and shapes of the tower's weights, without memory."""
        with torch.device("meta"):
            return Tower(self.config.vision_config)

    @cached_property
    def files(self) -> list[Path]:
        """The files of its weights; none of random ones. Warns of an adapter beside them, which is not applied.

        Raises ModelError: missing, damaged, or other layers than the config's.
        """
        if self.random:
            return []
        files = weight_files(self.folder)
        names = {name_in_memory(stored) for _, _, stored in stored_tensors(files)}
        for layers, count in (
            ("model.visual.blocks", self.config.vision_config.depth),
            ("model.language_model.layers", self.config.text_config.num_hidden_layers),
        ):
            last = f"{layers}.{count - 1}"
            if not any(name.startswith(f"{last}.") for name in names):
                hints = (hint for start, hint in ELSEWHERE.items() if any(name.startswith(start) for name in names))
                problem = f"the weights in {self.folder} lack {last}, the last layer that config.json counts"
                raise ModelError(problem, next(hints, BELONG))
        if (self.folder / ADAPTER).is_file():
            said = f"{self.folder} holds an adapter ({ADAPTER}) beside the weights, which is not used; {MERGE}"
            warnings.warn(said, ModelWarning, stacklevel=2)
        return files

    @cached_property
    def files_here(self) -> list[Path]:
        """The files of its weights on this machine; none if they are missing or incomplete."""
        try:
            return weight_files(self.folder) if self.folder else []
        except ModelError:
            return []

    @property
    def parameters(self) -> int:
        """Numbers in the weights; shared ones count once."""
        return parameter_count(self.config)

    @cached_property
    def weights_bytes(self) -> int:
        """Of memory that the loaded weights take."""
        return self.bytes_as(self.dtype, self.options.quantize)

    def bytes_as(self, dtype: str, quantize: str) -> int:
        """Return the bytes of memory that the weights would take in this dtype ("bf16") or quantization ("int8", or "none")."""
        if not self.native:
            return self.hosted_bytes(quantize, dtype)
        return needed_bytes(self.config, DTYPES[dtype], quantize, self._stays_mapped(dtype, quantize))

    def what_fits(self, beside: int = 0, *, quantized: bool = True) -> str:
        """Return a hint for a model that does not fit: the forms of it that do, on this device with its free memory.

        Args:
            beside: bytes of memory that are needed in addition to the weights.
            quantized: whether quantization is an option.
        """
        forms = []
        if quantized and self.can_be_quantized:
            forms += [(f"--quantize {kind}", self.dtype, kind) for kind in kinds(self.device)]
        if self.dtype == "fp32":
            slow = "" if default_dtype(self.device) == "bf16" else ", which is slow on this device,"
            forms.append((f"--dtype bf16{slow}", "bf16", "none"))
        hints = []
        for words, dtype, kind in forms:
            needed = self.bytes_as(dtype, kind)
            if not shortage(needed + beside, str(self.device)):
                hints.append(f"{words} needs about {size(needed)} for the weights")
        return "; ".join([*hints, "or use a smaller model" if hints else "use a smaller model"])

    @cached_property
    def packed_bytes(self) -> int:
        """Of memory that packed weights take on a CPU where it is free, beside the files they come from, which stay mapped."""
        dtype = DTYPES[self.dtype]
        if not (self.native and self._mapped and self.options.quantize == "none"):
            return 0
        if not can_pack(torch.empty(1, dtype=dtype, device=self.device)):
            return 0
        layers = [module for module in empty(self.config).to(dtype).modules() if type(module) is torch.nn.Linear]
        return sum(layer.weight.nbytes for layer in layers)

    @cached_property
    def _mapped(self) -> bool:
        """Whether weights `stay_mapped`; of a model that is not here, whether they would after its download."""
        return self._stays_mapped(self.dtype, self.options.quantize)

    def _stays_mapped(self, dtype: str, quantize: str) -> bool:
        if self.random:
            return False
        if self.files_here:
            return stay_mapped(self.files_here, DTYPES[dtype], self.device, quantize)
        return quantize != "none" or self._stored == DTYPES[dtype]

    def hosted_bytes(self, quantize: str, dtype: str | None = None) -> int:
        """Of the weights as transformers loads them: quantised ones as their files are, unless they are widened.

        `quantize`: what becomes of them afterwards; until then they have the dtype of their files.
        """
        if self.quantization and self.files_here and not are_widened(self.device, self.quantization):
            return sum(file.stat().st_size for file in self.files_here)
        return self.parameters * self.read_dtype(quantize, dtype).itemsize

    def read_dtype(self, quantize: str, dtype: str | None = None) -> torch.dtype:
        """In which transformers reads the weights: that of the files where they are quantised afterwards."""
        if quantize != "none" and self._stored:
            return self._stored
        return DTYPES[dtype or self.dtype]

    @property
    def download_bytes(self) -> int | None:
        """Of weights that have to be downloaded, roughly; 0 if they are here, None where that is unknown."""
        if self.files_here:
            return 0
        if self._stored and is_id(self.id):
            return self.parameters * self._stored.itemsize
        return None

    @cached_property
    def fingerprint(self) -> str:
        """A text that changes when the weights do.

        For a hub model its id and commit; for a folder a hash of the config and of the weight files' names, sizes and times,
        because hashing gigabytes takes too long.
        """
        if self.commit is not None and self.files:
            return f"{self.id}@{self.commit}"
        stats = file_stats(file.resolve() for file in self.files)
        return hashlib.sha256(_config_path(self.options, self.folder).read_bytes() + repr(stats).encode()).hexdigest()

    @cached_property
    def state(self) -> dict[str, Any] | None:
        """What answers come from: the commit of a hub model, or the state of a folder's files (`ModelOptions.state`)."""
        if self.commit is not None:
            return {"commit": self.commit}
        return self.options.state()

    @cached_property
    def _stored(self) -> torch.dtype | None:
        """The dtype of the published weights, if config.json says so."""
        content = read_json(_config_path(self.options, self.folder))
        parts = content, section(content, "text_config")  # some files say it of the language model alone
        name = next((said for part in parts if (said := part.get("dtype") or part.get("torch_dtype"))), None)
        return {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(name))


def find_model(options: ModelOptions, check: Callable[[FoundModel], Any] = lambda found: None) -> FoundModel:
    """Finds a model, and downloads it if it is on the hub and not here yet. Errors: as of `load_model`.

    `check`: called with what its config.json says, before weights are downloaded; it raises if the model will not do.
    """
    device = usable_device(options)
    random = options.load_format == "dummy"

    def check_config(path: Path) -> None:
        model = _found(options, device, path.parent)
        check_packages(model.quantization, options.model)
        check(model)

    if random and is_bundled(options.model):
        if options.revision is not None:
            problem = f"the bundled config of {options.model} has no revision {options.revision!r}"
            raise UsageError(problem, "leave the revision out")
        model = _found(options, device)
    else:
        model = _found(options, device, *locate(options, files=None if random else FILES, check=check_config))
    check(model)
    return model


def describe_model(options: ModelOptions) -> FoundModel:
    """Finds a model's settings, and downloads them alone if they are not here yet. A bundled config needs no hub."""
    device = usable_device(options)
    if is_bundled(options.model) and options.revision is None:
        return _found(options, device)
    return _found(options, device, *locate(options, files=["config.json", "*processor_config.json"]))


def look_up(options: ModelOptions) -> FoundModel:
    """Finds what this machine alone has of a model; no hub is asked.

    Raises ModelError: neither its folder nor its config is on this machine, or they are damaged. UsageError: as `find_model`.
    """
    device = usable_device(options)
    name = options.model
    revision = options.revision
    if is_id(name) and not Path(name).is_dir():
        if (folder := cached_folder(name, revision)) or (name in BUNDLED_CONFIGS and revision is None):
            return _found(options, device, folder)
        if not Path(name).exists():
            command = f"hf download {name} config.json preprocessor_config.json{_flag(revision)}"
            hint = f"{kind_hint(name)}its settings are small, and suffice: {command}"
            hint = near_hint(name).strip() or hint
            raise ModelError(f"{name} is not on this machine, and inspect does not use the network", hint)
    return _found(options, device, *locate(options, files=None))


def _config_path(options: ModelOptions, folder: Path | None) -> Path:
    return BUNDLED_CONFIGS[options.model] if folder is None else folder / "config.json"


def _found(
    options: ModelOptions, device: torch.device, folder: Path | None = None, commit: str | None = None
) -> FoundModel:
    path = _config_path(options, folder)
    model = FoundModel(options, device, folder, commit, read_config(path), quantization_in(path))
    check_engine(model)
    if not model.config.tie_word_embeddings or model.random or not separate_head(model.files_here):
        return model
    return replace(model, config=replace(model.config, tie_word_embeddings=False))


def locate(
    options: ModelOptions, *, files: list[str] | None, check: Callable[[Path], Any] | None = None
) -> tuple[Path, str | None]:
    """Return the folder of a model, and its commit if it is a hub id. `files`: patterns of what to download; None if nothing may
    be.

    `check`: as of `download`; by default the config must be one of a model that can run.
    """
    if folder := local_folder(options):
        return folder, None
    name = options.model
    if files is None:
        hint = f"random weights need a local folder, {', '.join(DEMOS)}, or {' and '.join(BUNDLED_CONFIGS)}"
        raise ModelError(f"no bundled config for {name}", hint)
    return download(name, options.revision, options.offline, files, check or read_config)


def usable_device(options: ModelOptions) -> torch.device:
    """Return the device of options. Raises UsageError if it cannot be used, or weights cannot be quantised on it."""
    device = pick_device(options.device)
    check_quantize(options.quantize, device)
    return device


def kind_hint(name: str) -> str:
    """Return the beginning of a hint: which models run, where the name does not look like one of them; else nothing."""
    if _CONVERTED.search(name):
        original = _ORIGINAL.search(name)
        instead = f"Qwen/{original[0]}" if original else "the original checkpoint"
        return f"its name is that of GGUF or MLX weights, which evoprune does not read; take {instead}; "
    if re.search(r"qwen-?((3|2[._]?5?)[-_]?vl|3[._]?[5-9])", name, re.IGNORECASE):
        return ""
    return f"{MODEL_HINT}; "


def _flag(revision: str | None) -> str:
    """Return what names a revision to `hf download`."""
    return "" if revision is None else f" --revision {revision}"


def download(
    name: str, revision: str | None, offline: bool, files: list[str], check: Callable[[Path], Any]
) -> tuple[Path, str]:
    """Return a hub model's folder in the hub's own cache, downloaded as far as needed and possible, and its commit.

    `check` is called with the config's path before any of `files`, which are patterns; it raises if the model cannot run.

    Raises ModelError: no such model or revision, no access, or the hub is out of reach and the cache does not hold it.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    unreachable = None
    if offline:
        unreachable = "the hub may not be asked (offline)"
    else:
        # One request without retries shows whether hub and model exist; the library's own calls retry for minutes.
        url = hub.hf_hub_url(name, "config.json", revision=revision)
        try:
            _within(HUB_SECONDS, lambda: hub.get_hf_file_metadata(url, timeout=HUB_SECONDS))
        except errors.RevisionNotFoundError as problem:
            raise ModelError(f"{name} has no revision {revision!r} on the hub", "leave the revision out") from problem
        except errors.RepositoryNotFoundError as problem:  # also: private, or gated
            hint = f"log in with `hf auth login` if it is private or gated; {MODEL_HINT}"
            hint = f"{near_hint(name) or 'check the spelling, or '}{hint}"
            raise ModelError(f"there is no folder {name} here, and no such model on the hub for you", hint) from problem
        except errors.EntryNotFoundError as problem:
            which = near_hint(name) or kind_hint(name) or f"{MODEL_HINT}; "
            hint = f"{which}adapters must be merged first, GGUF files are not read"
            raise ModelError(f"{name} has no config.json on the hub", hint) from problem
        except Exception as problem:  # the HTTP library below differs from version to version
            unreachable = f"the hub cannot be reached ({first_line(problem)})"

    def fetch(*patterns: str) -> Path:
        local = unreachable is not None
        try:
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local))
        except Exception as problem:
            if local:
                wanted = name
                hint = near_hint(name) or kind_hint(name)
                if revision is not None:
                    wanted = f"{name} at revision {revision}"
                    refs = Path(hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs"
                    if held := sorted(file.name for file in refs.glob("*")):
                        hint += f"the cache holds {listed(held)}; "
                hint += f"where there is a network: hf download {nearest_id(name) or name}{_flag(revision)} --local-dir DIR; "
                hint += "then DIR is the model. The demo needs neither"
                raise ModelError(f"{wanted} is not in the local cache, and {unreachable}", hint) from problem
            broken = f"the download of {name} broke off: {first_line(problem)}"
            raise ModelError(broken, "run it again to go on") from problem

    # Checked before gigabytes are downloaded.
    check(fetch("config.json") / "config.json")
    folder = fetch(*files)
    return folder, folder.name


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Return `work()`. Raises TimeoutError: HTTP timeouts leave out name resolution, which alone can take half a minute."""
    answer = Future()

    def run():
        try:
            answer.set_result(work())
        except BaseException as problem:
            answer.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answer.result()


def quantization_in(path: Path) -> str | None:
    """Return the method by which the checkpoint of a config.json is quantised; None if it is not."""
    content = read_json(path)
    with valid(f"{path} is damaged"):
        parts = content, section(content, "text_config")
        settings = next((given for part in parts if (given := section(part, "quantization_config"))), None)
        if settings is None:
            return None
        if any(settings.get(name) is True for name in BITS):
            return "bitsandbytes"
        if (method := settings.get("quant_method")) is not None:
            return TEXT.check(method, "quant_method")
    problem = f"the quantization_config in {path} does not name its method (quant_method)"
    raise ModelError(problem, "take a checkpoint whose method is known, or name it there, such as gptq")


def check_engine(found: FoundModel) -> None:
    """Raises ModelError: the asked-for engine cannot run the language model. UsageError: the weights cannot be quantised."""
    quantised = found.quantization and f"is quantised ({found.quantization})"
    options = found.options
    if options.engine == NATIVE and not found.native:
        why = quantised or "has layers that evoprune does not run itself"
        raise ModelError(f"{found.id} {why}", "leave the engine out: auto takes that of transformers")
    if options.quantize != "none" and not found.can_be_quantized:
        why = quantised or "is a mixture of experts"
        problem = f"quantize {options.quantize} is for dense models that are not quantised, and {found.id} {why}"
        raise UsageError(problem, "leave quantize out, or take a checkpoint that is quantised already")


def check_packages(quantization: str | None, name: str) -> None:
    """Raises ModelError: a package that a quantised checkpoint needs is not installed."""
    if quantization is None:
        return
    packages = PACKAGES.get(quantization, [])
    if missing := [package for package in [*packages, "accelerate"] if not _is_installed(package)]:
        are = "is" if len(missing) == 1 else "are"
        problem = f"{name} holds weights quantised by {quantization}, and {listed(missing)} {are} not installed"
        raise ModelError(problem, f"pip install {' '.join(missing)}")


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model. Their headers are read, so that missing or truncated files are found here."""
    # With the rules of Windows, both kinds of slash separate. Links may lead elsewhere, as those of the hub's cache do.
    inside = Rule(
        "the name of a file in the same folder",
        lambda v: isinstance(v, str) and v and not PureWindowsPath(v).anchor and ".." not in PureWindowsPath(v).parts,
    )
    files = [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not files[0].is_file() and index.is_file():
        with valid(f"{index} is damaged"):
            named = section(read_json(index), "weight_map")
            files = [folder / name for name in sorted({inside.check(v, f"weight_map.{k}") for k, v in named.items()})]
    elif not files[0].is_file():
        files = []
    # What was downloaded, the command that goes on with it, and whether that surely broke off.
    name = str(folder)
    again = "hf download ID --local-dir DIR"
    broken = any((folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"))
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        name = cached_id(folder.parents[1])
        broken = False
        again = f"hf download {name}"
    if not files and not broken:
        hint = (
            "weights must be model.safetensors, or shards with model.safetensors.index.json; other formats are not read"
        )
        if name != str(folder):
            hint += f". If the download was not finished: {again}"
        raise ModelError(f"{folder} holds no safetensors weights", hint)
    for file in files or [folder / "model.safetensors"]:
        if not file.is_file():
            if broken or name != str(folder):
                raise ModelError(
                    f"the download of {name} is not finished: {file.name} is missing", f"to go on: {again}"
                )
            raise ModelError(f"weights file {file} is missing", "get the file again")
        check_fetched(file)
        with _opened(file):
            pass
    return files


def _opened(file: Path) -> Any:
    with valid(f"weights file {file} is damaged or incomplete"):
        return open_safetensors(file)


def stored_tensors(files: Iterable[Path]) -> Iterator[tuple[Path, Any, str]]:
    """Yield of each tensor in safetensors files its file, that file opened by safetensors, and its name there."""
    for file in files:
        with _opened(file) as content:
            for stored in content.keys():  # noqa: SIM118 (not a dict)
                yield file, content, stored


def separate_head(files: Iterable[Path]) -> bool:
    """Return whether files hold an output layer that differs from the embeddings: transformers then ties the two under no
    config.
    """
    stored = ((name_in_memory(name), content, name) for _, content, name in stored_tensors(files))
    tensors = {known: content.get_tensor(name) for known, content, name in stored if known in (HEAD, EMBEDDINGS)}
    if len(tensors) < 2:
        return False
    head, embeddings = tensors.values()
    return head.dtype != embeddings.dtype or not torch.equal(head, embeddings)


def needed_bytes(config: Config, dtype: torch.dtype, quantize: str, mapped: bool) -> int:
    """Bytes that the weights take, from when they are read. `mapped`: whether they `stay_mapped`.

    Memory-mapped weights count: dropped ones are read again for every token. Those that are quantised are read no more than once.
    """
    model = empty(config).to(dtype)
    wide = sum(weight.nbytes for weight in model.parameters())
    if quantize != "none" and mapped:
        return wide - saved_bytes(model, quantize)
    return wide


def stay_mapped(files: list[Path], dtype: torch.dtype, device: torch.device, quantize: str = "none") -> bool:
    """Return whether weights are used, or quantised, as they are in their files."""
    stored = {content.get_slice(name).get_dtype() for _, content, name in stored_tensors(files[:1])}
    return bool(files) and are_mapped(device, stored, dtype, quantize)


def read_generation(folder: Path | None) -> GenerationSettings:
    """Return what a model's generation_config.json says. Warns of what it asks for and nothing here does."""
    path = None
    content = {}
    if folder is not None:
        path = folder / "generation_config.json"
        content = read_json(path)
    if asked := sorted(name for name, off in NOT_DONE.items() if content.get(name) and content[name] != off):
        warnings.warn(f"evoprune does not do what {path} asks for: {listed(asked)}", ModelWarning, stacklevel=2)
    with valid(f"{path} is damaged"):
        return pick(GenerationSettings, content, "")


def eos_ids(
    folder: Path | None, generation: GenerationSettings, config: Config, tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Return the tokens that end an answer, of the first file that names some.

    Raises ModelError: none of them is one of the model's.
    """
    ids = generation.eos_token_id
    file = "generation_config.json"
    if ids in (None, ()):
        ids = config.text_config.eos_token_id
        file = "config.json"
    if ids in (None, ()) and tokenizer is not None:
        ids = tokenizer.backend.token_to_id(tokenizer.named.get("eos_token", ""))
    if ids is None:
        ids = ()
    if not isinstance(ids, tuple):
        ids = (ids,)
    if never := [token for token in ids if token >= config.text_config.vocab_size]:
        said = f"eos_token_id {', '.join(map(str, never))} is no token of the model"
        if len(never) == len(ids):
            raise ModelError(f"{folder}/{file}: {said}, so no answer could end", "get the file again")
        warnings.warn(f"{folder}/{file}: {said}", ModelWarning, stacklevel=2)
    return tuple(token for token in ids if token not in never)
