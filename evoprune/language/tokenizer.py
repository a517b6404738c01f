"""Text to token ids and back, and the model's own chat template.

Uses the `tokenizers` library directly: transformers' wrapper takes longer to import than a short answer takes to compute.
"""

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evoprune.errors import ModelError, first_line, is_out_of_memory
from evoprune.language.template import render
from evoprune.model.config import TEXT, check_fetched, read_object

MAX_BYTES = {"tokenizer.json": 2**28, "chat_template.jinja": 2**20}  # Qwen's have 11 MB and 3 kB

KINDS = {"model": ("BPE",), "normalizer": ("NFC", "NFKC", "NoneType"), "decoder": ("ByteLevel",)}


@dataclass
class Tokenizer:
    """A model's tokenizer and chat template."""

    backend: Any  # a `tokenizers.Tokenizer`
    chat_template: str  # Jinja source
    # Tokens by their names in the tokenizer's settings, such as "eos_token"; templates may use them
    named: dict[str, str] = field(default_factory=dict)
    template_file: str = ""  # where the template is from, for errors

    def __post_init__(self):
        self.backend.encode_special_tokens = True  # special tokens in a user's text are ordinary words
        # A tokenizer that was saved after training may still truncate or pad to the lengths of its batches.
        self.backend.no_truncation()
        self.backend.no_padding()

    def specials(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens in it are encoded as ordinary words.

        Raises ModelError: the tokenizer breaks down, for example over a pattern that takes too many steps.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except BaseException as problem:  # a panic in Rust is no Exception
            if type(problem).__name__ != "PanicException":
                raise
            message = f"the model's tokenizer broke down: {first_line(problem)}"
            raise ModelError(message, "take the tokenizer of the original model", stage="prefill") from problem

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens. Incomplete characters become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict]) -> str:
        """A conversation in the model's own format, up to where its answer begins.

        Raises ValueError: the template is broken, refuses the messages, or takes too much. OSError: no process can be started.
        """
        context = {"messages": messages, "add_generation_prompt": True, "tools": None, "documents": None}
        return render(self.chat_template, context | self.named)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has tokenizer files."""
    there = {name for name in ("tokenizer.json", "vocab.json", "merges.txt") if (folder / name).is_file()}
    return "tokenizer.json" in there or {"vocab.json", "merges.txt"} <= there


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder. Raises ModelError: missing, damaged, or without a chat template."""
    if not has_tokenizer(folder):
        hint = "copy tokenizer.json and tokenizer_config.json from the original model"
        raise ModelError(f"{folder} holds no tokenizer", hint)
    try:
        backend = _backend(folder)
        # Other steps than those of Qwen's tokenizers could make gigabytes of a short text.
        for name, kinds in KINDS.items():
            kind = type(getattr(backend, name)).__name__
            if kind not in kinds:
                raise ValueError(f"its {name} is of kind {kind}, not {' or '.join(kinds)}".replace("NoneType", "none"))
        settings = _settings(folder / "tokenizer_config.json")
        template, source = _template(folder, settings)
    except Exception as problem:  # the Rust parser raises plain Exceptions
        if isinstance(problem, ModelError) or is_out_of_memory(problem):
            raise
        message = f"the tokenizer in {folder} cannot be loaded: {first_line(problem)}"
        raise ModelError(message, "get its files again") from problem
    if not template:
        hint = "copy chat_template.json from the original model"
        raise ModelError(f"the tokenizer in {folder} has no chat template", hint)
    # Either plain text or {"content": text, ...}.
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
    return Tokenizer(backend, template, {k: v for k, v in tokens.items() if isinstance(v, str)}, str(source))


def _backend(folder: Path):
    if (folder / "tokenizer.json").is_file():
        import tokenizers

        _check_size(folder / "tokenizer.json")
        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Only vocab.json and merges.txt: transformers knows the rest of Qwen's tokenizer.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer


def _check_size(file: Path) -> None:
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file.name} is no regular file")
    if file.stat().st_size > MAX_BYTES[file.name]:
        raise ValueError(f"{file.name} has more than {MAX_BYTES[file.name] // 2**20} MiB")
    check_fetched(file)


def _settings(path: Path) -> dict:
    if not os.path.lexists(path):
        return {}
    check_fetched(path)
    return read_object(path)


def _template(folder: Path, settings: dict) -> tuple[str | None, Path]:
    """The chat template, from its own file or from one of the files that older repositories use; and that file.

    Of these, the processor's comes first: it is the one that supports video.
    """
    file = folder / "chat_template.jinja"
    if os.path.lexists(file):
        _check_size(file)
        return file.read_text(encoding="utf-8"), file
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        found = (settings if file.name == "tokenizer_config.json" else _settings(file)).get("chat_template")
        if isinstance(found, list):  # several templates by name
            found = {each["name"]: each["template"] for each in found}.get("default")
        if found:
            return TEXT.check(found, f"{file.name}: chat_template"), file
    return None, file
