"""Encoded videos on disk: the same file, looked at in the same way by the same model, is encoded once.

An entry is a safetensors file named by a hash of everything that its numbers depend on, which it also holds. The cache never
fails a run: an entry that is damaged or has the name of another one counts as missing, and one that cannot be written is skipped.
"""

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

import evoprune
from evoprune import methods
from evoprune.model.config import loads
from evoprune.session.engine import Engine
from evoprune.session.entries import Entries, cache_folder, own_code
from evoprune.video.plan import Plan
from evoprune.vision.encoded import Encoded

LIMIT_BYTES = 2 * 2**30
READERS = {"pyav": "av", "decord": "decord", "pillow": "pillow"}  # the package that each decoder is
OPTIONAL = ("size", "deepstack")  # fields of `Encoded` that an entry need not have


@dataclass(frozen=True)
class Cache(Entries):
    """A folder of encoded videos; several processes may use it at a time."""

    folder: Path = field(default_factory=cache_folder)  # default: the one of `evoprune ask --cache`
    limit_bytes: int = LIMIT_BYTES  # of all entries together; the least recently used are deleted

    def key(self, engine: Engine, plan: Plan) -> str | None:
        """The entry's key: equal keys mean equal encodings. None without a fingerprint of the model or a readable file."""
        loaded = engine.loaded
        if loaded.fingerprint is None:
            return None
        try:
            content = content_hash(plan.info.path)
        except OSError:
            return None
        limits = loaded.limits[plan.kind]
        facts = {
            "video": content,
            "decoder": plan.decoder,
            "times": plan.sampling.times_s,
            "seconds_per_pair": plan.sampling.seconds_per_pair(limits.temporal_patch_size),
            "size": [plan.height, plan.width],
            "encoder": asdict(plan.encoder),
            "pixels": [*limits.normal, limits.patch_size, limits.temporal_patch_size, limits.merge_size],
            "model": [loaded.fingerprint, loaded.dtype, loaded.quantize, torch.device(loaded.device).type],
            "method": [repr(engine.method.before), engine.seed],  # the repr names the classes and all settings
            "code": [evoprune.__version__, torch.__version__, own_code(), methods.plugin_code(engine.options.method)],
            "reader": version(READERS[plan.decoder]),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()

    def load(self, key: str, device: torch.device) -> Encoded | None:
        """An entry, or None if there is none or it is damaged. Its `rows` are on the device `meta`: no answer needs them."""
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        if not path.is_file():  # nor a pipe, which nobody may ever write to
            return None
        try:
            with safe_open(path, framework="pt") as file:
                about = file.metadata()["about"]
                # Copies: what is mapped from a file is gone with it.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
                if file.metadata()["digest"] != _digest(about, tensors):
                    return None
            facts = loads(about)
            if facts["key"] != key:
                return None
            with suppress(OSError):  # a folder that may only be read
                os.utime(path)
            features = tensors["features"]
            return Encoded(
                features.to(device),
                tensors["kept"].to(device),
                features.new_empty(facts["rows"], features.shape[1], device="meta"),
                tensors["owner"].to(device),
                tuple(tuple(grid) for grid in facts["grids"]),
                [tuple(layer) for layer in facts["layers"]],
                0.0,
                facts["flat"],
                *(tensors[name].to(device) if name in tensors else None for name in OPTIONAL),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return None

    def store(self, key: str, encoded: Encoded) -> bool:
        """Writes an entry atomically, and deletes old ones beyond the limit; False if it cannot be written."""
        from safetensors.torch import save

        tensors = {name: getattr(encoded, name) for name in ("features", "kept", "owner", *OPTIONAL)}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items() if tensor is not None}
        facts = {
            "key": key,
            "rows": len(encoded.rows),
            "grids": encoded.grids,
            "layers": encoded.layers,
            "flat": encoded.flat,
        }
        about = json.dumps(facts)
        content = save(tensors, {"about": about, "digest": _digest(about, tensors)})
        return len(content) <= self.limit_bytes and self.write(key, lambda file: file.write(content))


def content_hash(path: str | os.PathLike[str]) -> str:
    """A hash of a file's bytes; of a folder, of its files and their names. Raises OSError if it cannot be read."""
    path = Path(path)
    if not path.is_dir():
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()
    inside = sorted(p for p in path.iterdir() if p.is_file())
    return hashlib.blake2b(repr([(p.name, content_hash(p)) for p in inside]).encode()).hexdigest()


def _digest(about: str, tensors: dict[str, torch.Tensor]) -> str:
    """A hash of everything in an entry: safetensors notices a file that is too short, but not a flipped bit."""
    found = hashlib.blake2b(about.encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy())
    return found.hexdigest()
