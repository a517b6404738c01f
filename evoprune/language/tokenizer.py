"""Text to token ids and back, and the model's own chat template.

Uses the `tokenizers` library directly: transformers' wrapper takes longer to import than a short answer takes to compute.
"""

import json
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from evoprune.errors import ModelError, first_line, is_out_of_memory


@dataclass
class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        backend: a `tokenizers.Tokenizer`.
        chat_template: Jinja source.
        named: tokens by their names in the tokenizer's settings, such as "eos_token"; templates may use them.
    """

    backend: Any
    chat_template: str
    named: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.backend.encode_special_tokens = True  # special tokens in a user's text are ordinary words
        # A tokenizer that was saved after training may still truncate or pad to the lengths of its batches.
        self.backend.no_truncation()
        self.backend.no_padding()

    def specials(self) -> dict[str, int]:
        """The special tokens and their ids."""
        return {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Special tokens in it are encoded as ordinary words."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of `ids` without special tokens. Incomplete characters become U+FFFD."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def render(self, messages: list[dict]) -> str:
        """A conversation in the model's own format, up to where its answer begins.

        The template is a program from an untrusted source: it runs in Jinja's sandbox.

        Raises:
            jinja2.TemplateError: the template is broken, or refuses the messages.
        """
        template = _compiled(self.chat_template)
        return template.render(messages=messages, add_generation_prompt=True, tools=None, documents=None, **self.named)


@lru_cache(maxsize=4)
def _compiled(source: str):
    """A compiled chat template; compiling takes longer than rendering."""
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    # The same settings as in transformers, so that line breaks are the same.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **kw: json.dumps(value, ensure_ascii=False, **kw)
    environment.globals["raise_exception"] = refuse
    return environment.from_string(source)


def has_tokenizer(folder: Path) -> bool:
    """Whether a model's folder has tokenizer files."""
    return (folder / "tokenizer.json").is_file() or all(
        (folder / name).is_file() for name in ("vocab.json", "merges.txt")
    )


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in a model's folder.

    Raises:
        ModelError: missing, damaged, or without a chat template.
    """
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} holds no tokenizer", "copy tokenizer.json and tokenizer_config.json from the original model"
        )
    try:
        backend = _backend(folder)
        settings = _settings(folder / "tokenizer_config.json")
        template = _template(folder, settings)
    except Exception as problem:  # the Rust parser raises plain Exceptions
        if is_out_of_memory(problem):
            raise
        raise ModelError(
            f"the tokenizer in {folder} cannot be loaded: {first_line(problem)}", "get its files again"
        ) from problem
    if not template:
        raise ModelError(
            f"the tokenizer in {folder} has no chat template", "copy chat_template.json from the original model"
        )
    # Either plain text or {"content": text, ...}.
    tokens = {k: v.get("content") if isinstance(v, dict) else v for k, v in settings.items() if k.endswith("_token")}
    return Tokenizer(backend, template, {k: v for k, v in tokens.items() if isinstance(v, str)})


def _backend(folder: Path):
    if (folder / "tokenizer.json").is_file():
        import tokenizers

        return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Only vocab.json and merges.txt: transformers knows the rest of Qwen's tokenizer.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False).backend_tokenizer


def _settings(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _template(folder: Path, settings: dict) -> str | None:
    """The chat template, from its own file or from one of the files that older repositories use.

    Of these, the processor's comes first: it is the one that supports video.
    """
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    found = _settings(folder / "chat_template.json").get("chat_template") or settings.get("chat_template")
    if isinstance(found, list):  # several templates by name
        found = {each["name"]: each["template"] for each in found}.get("default")
    return found
