"""Check a tokenizer's components before the tokenizers library builds them.

Many components of that library can turn a short text or a short file into gigabytes, or take minutes to build. Qwen's tokenizers
use only a few of them, so everything else is rejected.
"""

import json
from typing import Any

from evoprune.untrusted import OBJECT, TEXT, Rule

MAX_PARTS = 16  # maximum number of components in a sequence
MAX_CHARACTERS = 4096  # maximum length of a token or pattern; the longest of Qwen's has 256
MAX_ADDED = 2**16  # maximum number of tokens outside the vocabulary; Qwen's tokenizers have about 30
MAX_ADDED_CHARACTERS = 2**20  # maximum total length of these tokens; a search for them takes 100 bytes per character
MAX_VOCABULARY = 2**20  # maximum number of tokens in the vocabulary; Qwen3.5's has about 250,000
KINDS = {
    "model": ("BPE",),
    "normalizer": ("NFC", "NFKC", "none"),
    "pre_tokenizer": ("Split", "ByteLevel", "none"),
    "post_processor": ("TemplateProcessing", "ByteLevel", "none"),
    "decoder": ("ByteLevel",),
}
PARTS = {"pre_tokenizer": "pretokenizers", "post_processor": "processors"}  # names of the lists in sequences
SHORT = Rule(
    f"a string of 1 to {MAX_CHARACTERS:,} characters", lambda v: isinstance(v, str) and 0 < len(v) <= MAX_CHARACTERS
)


def check_components(text: str | bytes) -> None:
    """Check the contents of a `tokenizer.json`.

    Raises:
        ValueError: If it isn't valid JSON, has a component that Qwen's tokenizers don't have, or has extreme settings.
        RecursionError: If it is nested too deeply.
    """
    content = OBJECT.check(json.loads(text, object_pairs_hook=_unique), "its content")
    for name in KINDS:
        for part in _parts(content.get(name), name):
            _check_part(part, name)
    added = content.get("added_tokens") or []
    if not isinstance(added, list) or len(added) > MAX_ADDED:
        raise ValueError(f"added_tokens is not a list of at most {MAX_ADDED:,} values")
    texts = [SHORT.check(OBJECT.check(token, "an added token").get("content"), "an added token") for token in added]
    if sum(map(len, texts)) > MAX_ADDED_CHARACTERS:
        raise ValueError(f"the added tokens have more than {MAX_ADDED_CHARACTERS:,} characters")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Rejects duplicate names, because parsers differ in which of the values they use."""
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a name appears twice in an object")
    return value


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """Return the parts of a component, which is a list of one element unless the component is a sequence."""
    if component is None:
        return [{"type": "none"}]
    component = OBJECT.check(component, f"its {name}")
    if component.get("type") != "Sequence" or name not in PARTS:
        return [component]
    parts = component.get(PARTS[name])
    if not isinstance(parts, list) or len(parts) > MAX_PARTS:
        raise ValueError(f"its {name} is not a sequence of at most {MAX_PARTS} parts")
    return [OBJECT.check(part, f"a part of its {name}") for part in parts]


def _check_part(part: dict[str, Any], name: str) -> None:
    kind = part.get("type", "BPE" if name == "model" else None)
    if kind not in KINDS[name]:
        shown = TEXT.check(kind, f"the type of its {name}")[:100]
        raise ValueError(f"its {name} is {shown}, not {' or '.join(KINDS[name])}")
    if kind == "BPE":
        if any(part.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")):
            raise ValueError("its model has dropout, a prefix, or a suffix")
        if len(OBJECT.check(part.get("vocab"), "its vocabulary")) > MAX_VOCABULARY:
            raise ValueError(f"its vocabulary has more than {MAX_VOCABULARY:,} tokens")
    elif kind == "Split":
        pattern = OBJECT.check(part.get("pattern"), "a pattern")
        for text in pattern.values():
            SHORT.check(text, "a pattern")
    elif kind == "TemplateProcessing":
        template = part.get("single")
        if not isinstance(template, list) or len(template) > MAX_PARTS:
            raise ValueError(f"its {name} has no template of at most {MAX_PARTS} parts")
        texts = [piece for piece in template if isinstance(piece, dict) and "Sequence" in piece]
        if len(texts) != 1:
            raise ValueError(f"its {name} contains the text {len(texts)} times, not once")
