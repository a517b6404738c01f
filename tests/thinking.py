"""Chat templates that handle thoughts like published ones, and a model that says a given text."""

from itertools import islice

import tokenizers

from evoprune.language import Tokenizer
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

_BEGIN = "{{ '<|im_start|>assistant\\n' }}"
assert _BEGIN in CHAT_TEMPLATE


def _ending(jinja: str) -> str:
    """Return the template of `tests.tiny` with `jinja` after the beginning of the answer."""
    return CHAT_TEMPLATE.replace(_BEGIN, _BEGIN + jinja)


EMPTY, OPEN = "<think>\\n\\n</think>\\n\\n", "<think>\\n"
# Qwen3.5 from 4B on thinks unless it is switched off; smaller ones only think if it is switched on. The thinking models of
# Qwen3-VL always think; Qwen3 opens its thoughts itself.
_SWITCH = "{%- if enable_thinking is defined and ASKED -%}{{ 'THEN' }}{%- else -%}{{ 'ELSE' }}{%- endif -%}"


def _switch(asked: str, then: str, otherwise: str) -> str:
    return _ending(_SWITCH.replace("ASKED", asked).replace("THEN", then).replace("ELSE", otherwise))


THINKING = {
    "unless off": _switch("not enable_thinking", EMPTY, OPEN),
    "if on": _switch("enable_thinking", OPEN, EMPTY),
    "always": _ending(f"{{{{ '{OPEN}' }}}}"),
    "by itself": _switch("not enable_thinking", EMPTY, ""),
}


def thinking_tokenizer(template: str = "unless off", special: bool | None = False) -> Tokenizer:
    """Return the tokenizer of `tests.tiny` with the thought tags `<think>` and `</think>`.

    The tags are ordinary tokens (False, as in Qwen), special tokens (True), or only text (None).
    """
    hf = tiny_tokenizer()
    backend = tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str())
    if special is not None:
        tokens = [tokenizers.AddedToken(text, special=special, normalized=False) for text in ("<think>", "</think>")]
        (backend.add_special_tokens if special else backend.add_tokens)(tokens)
    return Tokenizer(backend, THINKING.get(template, CHAT_TEMPLATE))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text that the model generated, with special tokens encoded as such."""
    tokenizer.backend.encode_special_tokens = False
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    tokenizer.backend.encode_special_tokens = True
    return ids


class Saying:
    """Replacement for `TokenStream`: a model that says a given text and ends."""

    def __init__(self, tokenizer: Tokenizer, text: str):
        self._said, self.ids, self.finish_reason = iter(ids_of(tokenizer, text)), [], None

    def __call__(self, state, settings, eos_ids, seed, constraint=None):
        self._said = islice(self._said, settings.max_new_tokens)
        self._most = settings.max_new_tokens
        return self

    def __iter__(self):
        return self

    def __next__(self) -> int:
        for token in self._said:
            self.ids.append(token)
            return token
        self.finish_reason = "length" if len(self.ids) == self._most else "stop"
        raise StopIteration
