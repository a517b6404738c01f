"""Find a model's weight files, and estimate the memory needed for the weights without loading them.

Only safetensors and GGUF files are read, and code shipped with a model is never executed.
"""

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

import torch

from evoprune.backend import Device, Packing, Quantization, pick_device
from evoprune.errors import ModelError, ModelWarning
from evoprune.model import Config, Cost, QwenVL
from evoprune.session.gguf.folder import INDEX as GGUF_INDEX
from evoprune.session.gguf.folder import gguf_facts, gguf_files
from evoprune.session.loading.description import ADAPTER, MERGE_HINT, ModelDescription, read_json, valid
from evoprune.session.memory import TEXT, piece_needs
from evoprune.session.patches import LIMIT_BYTES, patch_bytes
from evoprune.session.published import BUNDLED_CONFIGS, SMALL_FILES, cached_id, is_id
from evoprune.untrusted import Rule, check_fetched, section
from evoprune.util import counted, file_stats, listed, open_safetensors, size, some
from evoprune.video import Plan

if TYPE_CHECKING:
    from evoprune.session.gguf.tensors import GgufTensors

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PACKAGES = {  # packages that transformers requires for each quantization method, in addition to accelerate
    "awq": ["gptqmodel"],
    "gptq": ["gptqmodel", "optimum"],
    "bitsandbytes": ["bitsandbytes"],
    "compressed-tensors": ["compressed-tensors"],
    "hqq": ["hqq"],
    "quanto": ["optimum-quanto"],
    "torchao": ["torchao"],
}
# Safetensors dtypes of plain floating-point weights. Weights in any other dtype have separate scales.
PLAIN = ("BF16", "F16", "F32", "F64")
WeightFiles = Mapping[Path, Collection[str]]  # weight files, with the names of the tensors to read from each file
INDEX = "model.safetensors.index.json"  # says which file contains a tensor
HEAD = "lm_head.weight"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
MTP = "mtp."  # prefix of the tensors for multi-token prediction
MISMATCH_HINT = "config.json and the weights must match; download the model again"
# Hints for weights saved inside a wrapper, by the prefix that the wrapper adds to tensor names.
WRAPPER_HINTS = {
    "base_model.model.": f"the weights are wrapped in an adapter; {MERGE_HINT}",
    "module.": "the weights are wrapped in DistributedDataParallel or DataParallel; save the wrapper's `module`",
    "_orig_mod.": "the weights are wrapped by torch.compile; save the wrapper's `_orig_mod`",
    "vision_tower.": "the weights were converted, for example for MLX; use the original checkpoint",
    "language_model.model.": "the weights were converted, for example for MLX; use the original checkpoint",
}


@dataclass(frozen=True)
class ModelWeights:
    """A model's weights before they are loaded. Use `weights_of` to create an instance."""

    description: ModelDescription
    device: torch.device

    def download(self) -> None:
        """Download a hub model's weights and small files.

        Raises:
            ModelError: If a package required by quantized weights isn't installed, or the download fails (see `hub.fetch`).
        """
        check_packages(self.description.quantization, self.description.id)
        self.description.download(*SMALL_FILES, "*.safetensors")

    @cached_property
    def files(self) -> WeightFiles:
        """The weight files, or an empty dict for random weights. An adapter in the same folder is ignored with a warning.

        Raises:
            ModelError: If files are missing or damaged, or don't contain the last layer described by config.json.
        """
        if self.description.random:
            return {}
        files = weight_files(self.description.folder)
        names = {name_in_memory(stored) for _, _, stored in stored_tensors(files)}
        for layers, count in (
            ("model.visual.blocks", self.description.config.vision_config.depth),
            ("model.language_model.layers", self.description.config.text_config.num_hidden_layers),
        ):
            last = f"{layers}.{count - 1}"
            if not any(name.startswith(f"{last}.") for name in names):
                hints = (hint for start, hint in WRAPPER_HINTS.items() if any(name.startswith(start) for name in names))
                problem = (
                    f"the weights in {self.description.folder} lack {last}, the last layer according to config.json"
                )
                raise ModelError(problem, next(hints, MISMATCH_HINT))
        if (self.description.folder / ADAPTER).is_file():
            message = (
                f"the adapter next to the weights in {self.description.folder} ({ADAPTER}) is ignored; {MERGE_HINT}"
            )
            warnings.warn(message, ModelWarning, stacklevel=2)
        return files

    @cached_property
    def files_here(self) -> WeightFiles:
        """The weight files on this machine, or an empty dict if they are missing or incomplete."""
        try:
            return weight_files(self.description.folder) if self.description.folder else {}
        except ModelError:
            return {}

    @cached_property
    def config(self) -> Config:
        """The model's config, adapted to the files and the device.

        Embeddings are not tied if the files contain a different output layer. There is no layer for multi-token prediction if the
        files don't contain it, as in checkpoints saved by transformers, or if drafts don't save time on the device.
        """
        config = self.description.config
        files = {} if self.description.random else self.files_here
        if config.tie_word_embeddings and separate_head(files):
            config = replace(config, tie_word_embeddings=False)
        drafts = self.description.native and not self.description.random and Device(self.device).reads_drafts
        if config.text_config.mtp_num_hidden_layers and not (drafts and (not files or has_mtp(config, files))):
            config = replace(config, text_config=replace(config.text_config, mtp_num_hidden_layers=0))
        return config

    @property
    def parameters(self) -> int:
        """Number of model parameters, counting tied parameters once."""
        return Cost(self.config).parameters

    @cached_property
    def bytes(self) -> int:
        """Estimated size of the loaded weights in memory, in bytes."""
        return self.bytes_as(self.description.dtype, self.description.quantize)

    def bytes_as(self, dtype: str, quantize: str) -> int:
        """Estimate how many bytes of memory the weights would take with a given dtype and quantization.

        A quantized checkpoint takes as much memory as its files, unless its weights have to be converted to a wider dtype. If
        evoprune quantizes a model run by transformers, the weights are first read in their stored dtype.

        Args:
            dtype: The dtype name, such as "bf16".
            quantize: The quantization name, such as "int8", or "none".
        """
        model = self.description
        if model.native:
            return needed_bytes(self.config, DTYPES[dtype], quantize, self._stays_mapped(dtype, quantize))
        if model.quantization and self.files_here and not Device(self.device).widens(model.quantization):
            return sum(file.stat().st_size for file in self.files_here)
        return self.parameters * self.read_dtype(dtype, quantize).itemsize

    def read_dtype(self, dtype: str, quantize: str) -> torch.dtype:
        """Return the dtype in which transformers should load the weights.

        To save memory, weights that will be quantized afterwards are loaded in their stored dtype, if it is known.
        """
        if quantize != "none" and self.description.stored_dtype:
            return DTYPES[self.description.stored_dtype]
        return DTYPES[dtype]

    def what_fits(self, beside: int = 0, *, quantized: bool = True) -> str:
        """Return a hint for a model that doesn't fit into memory, listing the dtypes and quantizations that would fit.

        Args:
            beside: Memory needed in addition to the weights, in bytes.
            quantized: Whether the hint may suggest quantization.
        """
        forms = []
        if quantized and self.description.can_be_quantized:
            forms += [(f"--quantize {kind}", self.description.dtype, kind) for kind in Quantization.kinds(self.device)]
        if self.description.dtype == "fp32":
            slow = "" if Device(self.device).default_dtype == "bf16" else ", which is slow on this device,"
            forms.append((f"--dtype bf16{slow}", "bf16", "none"))
        hints = []
        for words, dtype, kind in forms:
            needed = self.bytes_as(dtype, kind)
            if not Device(self.device).shortage(needed + beside):
                hints.append(f"{words} needs about {size(needed)} for the weights")
        return "; ".join([*hints, "or use a smaller model" if hints else "use a smaller model"])

    @cached_property
    def packed_bytes(self) -> int:
        """Size of the packed weights, in bytes, which a CPU stores in addition to the memory-mapped files if memory allows.

        If the weights are quantized, this assumes a later start, which maps a file of quantized weights.
        """
        dtype = DTYPES[self.description.dtype]
        quantize = self.description.quantize
        if not (self.description.native and self._stays_mapped(self.description.dtype, quantize)):
            return 0
        model = QwenVL.empty(self.config).to(dtype)
        if quantize != "none":
            return Quantization(quantize).packed_bytes(model)
        if not Packing.supports(torch.empty(1, dtype=dtype, device=self.device)):
            return 0
        return sum(module.weight.nbytes for module in model.modules() if type(module) is torch.nn.Linear)

    def _stays_mapped(self, dtype: str, quantize: str) -> bool:
        """Return True if the weights will stay memory-mapped. For weights not yet downloaded, this is a prediction."""
        if self.description.random:
            return False
        if self.files_here:
            return stay_mapped(self.files_here, DTYPES[dtype], self.device, quantize)
        return quantize != "none" or self.description.stored_dtype == dtype

    @property
    def download_bytes(self) -> int | None:
        """Estimated download size in bytes, which is 0 if the weights are already on this machine and None if it is unknown."""
        if self.files_here:
            return 0
        if self.description.stored_dtype and is_id(self.description.id):
            return self.parameters * DTYPES[self.description.stored_dtype].itemsize
        return None

    def facts(self) -> dict[str, Any]:
        """Return a summary of the model as a dict, including its layers, its memory use, and whether it is on disk."""
        model = self.description
        vision = model.config.vision_config
        text = model.config.text_config
        return {
            "id": model.id,
            "on_disk": bool(self.files_here),
            **gguf_facts(model.folder),
            "download_bytes": self.download_bytes,
            "tower": {"layers": vision.depth, "hidden_size": vision.hidden_size},
            "language_model": {"layers": text.num_hidden_layers, "hidden_size": text.hidden_size},
            "context_tokens": text.max_position_embeddings,
            "parameters": self.parameters,
            "dtype": model.dtype,
            "device": model.device,
            "weights_bytes": self.bytes,
        }

    def memory_facts(self, plan: Plan) -> dict[str, Any]:
        """Return how much memory is needed to ask a question about an input.

        The estimates for the weights and the work are the same as in the check before a run. The memory of the program is added to
        them. The "enough" entry is True if enough memory is available, or None if the available memory is unknown.
        """
        model = self.description
        pruning = plan.pruning.config()
        encoder = plan.encoder
        text = model.config.text_config
        share = pruning.budget.share_of_all([encoder.grid])
        prompt = pruning.method.prompt_columns(text.num_hidden_layers, encoder.keep, TEXT, share, text.linear_layers)
        available = Device(model.device).available_memory()
        bytes_each = DTYPES[model.dtype].itemsize
        # If memory is low, try smaller pieces, just like an actual run.
        program = Device(self.device).program_bytes(text.vocab_size)
        for _, working in piece_needs(model.config, self.device, encoder, bytes_each, prompt):
            needed = program + self.bytes + working
            if available is None or needed <= available:
                break
        enough = None
        if available is not None:
            enough = needed <= available
        most = needed + self.packed_bytes
        patches = patch_bytes(plan, model.limits[plan.kind])
        if patches <= LIMIT_BYTES:
            most += patches
        return {
            "method": pruning.name,
            "budget": pruning.budget.recorded,
            "visual_tokens": encoder.keep,
            "language_layers": None if isinstance(prompt, int) else [[i, n - TEXT] for i, n in enumerate(prompt)],
            "program_bytes": program,
            "weights_bytes": self.bytes,
            "working_bytes": working,
            "needed_bytes": needed,
            "used_if_free_bytes": most,
            "available_bytes": available,
            "enough": enough,
        }

    @cached_property
    def fingerprint(self) -> str:
        """A string that identifies the weights and changes whenever they change.

        For a hub model, it consists of the ID and the commit. For a folder, it is a hash of the config and the weight files'
        `file_stats`, because hashing gigabytes of weights would take too long. As a result, it also changes when the files are
        moved or copied.
        """
        model = self.description
        if model.commit is not None and self.files:
            return f"{model.id}@{model.commit}"
        files = gguf_files(model.folder) or list(self.files)
        if files and (model.folder / INDEX).is_file():
            files.append(model.folder / INDEX)
        stats = file_stats(file.resolve() for file in files)
        config = BUNDLED_CONFIGS[model.id] if model.folder is None else model.folder / "config.json"
        return hashlib.sha256(config.read_bytes() + repr(stats).encode()).hexdigest()


def weights_of(model: ModelDescription) -> ModelWeights:
    """Return a `ModelWeights` object for a described model, without loading the weights.

    Raises:
        UsageError: If the model's device cannot be used, or doesn't support the requested quantization.
    """
    device = pick_device(model.device, auto=model.options.device == "auto")
    Quantization(model.quantize).check(device)
    return ModelWeights(model, device)


def check_packages(quantization: str | None, name: str) -> None:
    """Check that all packages required to load a quantized checkpoint are installed.

    Raises:
        ModelError: If a package is missing.
    """
    if quantization is None:
        return
    packages = PACKAGES.get(quantization, [])
    if missing := [package for package in [*packages, "accelerate"] if not _is_installed(package)]:
        are = "is" if len(missing) == 1 else "are"
        problem = f"{name} contains weights quantized by {quantization}, but {listed(missing)} {are} not installed"
        raise ModelError(problem, f"pip install {' '.join(missing)}")


def _is_installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def weight_files(folder: Path) -> WeightFiles:
    """Find a model's safetensors files, and read their headers to detect truncated files.

    If an index says which file contains a tensor, other copies of this tensor don't count, because a program that replaced the
    tensor may have left old copies in other files.

    Raises:
        ModelError: If there are no safetensors files, or a file is missing, damaged, or incomplete.
    """
    # `PureWindowsPath` accepts both slashes and backslashes as separators. Links to other folders are allowed, because the hub
    # cache uses them.
    inside = Rule(
        "the name of a file in the same folder",
        lambda v: isinstance(v, str) and v and not PureWindowsPath(v).anchor and ".." not in PureWindowsPath(v).parts,
    )
    if tensors := open_gguf(folder):
        return {folder / GGUF_INDEX: set(tensors.keys())}
    files = [folder / "model.safetensors"]
    index = folder / INDEX
    named = {}
    if not files[0].is_file() and index.is_file():
        with valid(f"{index} is damaged"):
            named = section(read_json(index), "weight_map")
            files = [folder / name for name in sorted({inside.check(v, f"weight_map.{k}") for k, v in named.items()})]
    elif not files[0].is_file():
        files = []
    # The download's name, the command to resume it, and whether it is known to be incomplete.
    name = str(folder)
    again = "hf download ID --local-dir DIR"
    broken = any((folder / ".cache" / "huggingface" / "download").rglob("*.incomplete"))
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        name = cached_id(folder.parents[1])
        broken = False
        again = f"hf download {name}"
    if not files and not broken and (found := sorted(file.name for file in folder.glob("model*.safetensors"))):
        problem = (
            f"{folder} contains {some(found)}, but no {index.name}, which says which tensors to read from each file"
        )
        hint = "download it; or, if one file has all tensors, rename it to model.safetensors and delete the others"
        raise ModelError(problem, hint)
    if not files and not broken:
        hint = "weights must be model.safetensors, or shards with model.safetensors.index.json; other formats are not supported"
        if "gguf" in name.lower():
            from evoprune.session.hub import kind_hint

            hint = kind_hint(name).strip("; ") or hint
        elif name != str(folder):
            hint += f"; if the download was interrupted: {again}"
        raise ModelError(f"{folder} contains no safetensors weights", hint)
    stored = {}
    for file in files or [folder / "model.safetensors"]:
        if not file.is_file():
            if broken or name != str(folder):
                raise ModelError(f"the download of {name} is incomplete: {file.name} is missing", f"to resume: {again}")
            raise ModelError(f"weights file {file} is missing", "download the file again")
        check_fetched(file)
        with _opened(file) as content:
            stored[file] = set(content.keys())
    return _indexed(stored, {name: folder / file for name, file in named.items()})


def _indexed(stored: WeightFiles, index: Mapping[str, Path]) -> WeightFiles:
    """Return the names of the tensors to read from each file.

    Args:
        stored: The names of the tensors in each file.
        index: The file of each tensor according to the index, or an empty dict if there is no index.
    """
    chosen = {name_in_memory(name) for name, file in index.items() if name in stored[file]}
    return {
        file: {name for name in names if index.get(name) == file or name_in_memory(name) not in chosen}
        for file, names in stored.items()
    }


def open_gguf(folder: Path | None) -> "GgufTensors | None":
    """Return the tensors of a model's GGUF files, or None if it is a folder of another kind. See `gguf_tensors` for the errors."""
    if not gguf_files(folder):
        return None

    from evoprune.session.gguf.tensors import gguf_tensors

    return gguf_tensors(folder)


def _opened(file: Path) -> Any:
    if file.name == GGUF_INDEX:
        return open_gguf(file.parent)
    with valid(f"weights file {file} is damaged or incomplete"):
        return open_safetensors(file)


def stored_tensors(files: WeightFiles) -> Iterator[tuple[Path, Any, str]]:
    """Yield a tuple for each tensor of a model: the file path, the opened file, and the tensor name."""
    for file, names in files.items():
        with _opened(file) as content:
            yield from ((file, content, stored) for stored in content.keys() if stored in names)  # noqa: SIM118


def check_no_copies(files: WeightFiles) -> None:
    """Check that no file contains a different copy of a tensor that another file has according to the index.

    Raises:
        ModelError: If there is such a copy. transformers would read the copy in the last file, regardless of the index.
    """
    homes = {stored: file for file, names in files.items() for stored in names}
    for file, names in files.items():
        with _opened(file) as content:
            for stored in sorted(set(content.keys()) & homes.keys() - names):
                with _opened(homes[stored]) as home:
                    if not torch.equal(content.get_tensor(stored), home.get_tensor(stored)):
                        problem = f"{file} contains a different copy of {stored} than {homes[stored].name}"
                        raise ModelError(problem, f"remove it from {file.name}; the index names {homes[stored].name}")


def name_in_memory(name: str) -> str:
    """Convert a tensor name in a checkpoint to the corresponding name in the module tree (model/weights.py).

    The names may differ because published checkpoints use older names for the tower and the language model.
    """
    if name.startswith("visual."):
        return "model." + name
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + name.removeprefix("model.")
    return name


def separate_head(files: WeightFiles) -> bool:
    """Return True if the weight files contain an output layer that differs from the input embeddings.

    If so, transformers doesn't tie them, regardless of the config.
    """
    if not {HEAD, EMBEDDINGS} <= {name_in_memory(name) for names in files.values() for name in names}:
        return False
    stored = ((name_in_memory(name), content, name) for _, content, name in stored_tensors(files))
    tensors = {known: content.get_tensor(name) for known, content, name in stored if known in (HEAD, EMBEDDINGS)}
    head, embeddings = tensors.values()
    return head.dtype != embeddings.dtype or not torch.equal(head, embeddings)


def has_mtp(config: Config, files: WeightFiles) -> bool:
    """Return True if the weight files contain the layer for multi-token prediction. If it is incomplete, warn and return False."""
    wanted = {name: weight.shape for name, weight in QwenVL.empty(config).state_dict().items() if name.startswith(MTP)}
    found = {name for names in files.values() for name in names if name.startswith(MTP)}
    if config.text_config.experts:
        from evoprune.session.loading.experts import SeparateExperts

        found |= {place.joined for place in map(SeparateExperts(wanted).place_of, found) if place}
    missing = sorted(wanted.keys() - found)
    if missing and len(missing) < len(wanted):
        lacks = f"lack {counted(len(missing), 'tensor')} of the layer for multi-token prediction, first {missing[0]}"
        message = f"the weights in {next(iter(files)).parent} {lacks}, so answers are generated without it"
        warnings.warn(message, ModelWarning, stacklevel=2)
    return not missing


def needed_bytes(config: Config, dtype: torch.dtype, quantize: str, mapped: bool) -> int:
    """Estimate how many bytes of memory the weights need during loading and afterwards.

    The estimate includes memory-mapped weights. They are read for each token, so any evicted pages would have to be loaded again.
    If mapped weights will be quantized, they are read only once, so only their quantized size counts. Mapped embeddings count only
    if they are also the output layer, because otherwise, only the rows of the tokens are read.

    Args:
        mapped: Whether the weights stay memory-mapped (see `stay_mapped`). If they are quantized, this assumes a later start.
    """
    model = QwenVL.empty(config).to(dtype)
    needed = sum(weight.nbytes for weight in model.parameters())
    if quantize != "none" and mapped:
        needed -= Quantization(quantize).saved_bytes(model)
    embeddings = model.model.language_model.embed_tokens.weight
    if mapped and (quantize != "none" or model.lm_head.weight is not embeddings):
        needed -= embeddings.nbytes
    return needed


def stay_mapped(files: WeightFiles, dtype: torch.dtype, device: torch.device, quantize: str = "none") -> bool:
    """Return True if the weights stay in memory-mapped files, from which they are used or quantized directly."""
    first = dict(list(files.items())[:1])
    stored = {content.get_slice(name).get_dtype() for _, content, name in stored_tensors(first)}
    return bool(files) and Device(device).maps_weights(stored, dtype, quantize)
