"""Answer questions about visual tokens, from tokenizing the prompt to generating the answer.

`Prompt.build` builds a prompt, `prune_prompt` removes the pruned tokens, and `LanguageModel.prefill` or a `PrefixCache` reads the
remaining tokens. The resulting `PrefillState` is then used by an `AnswerStream` to generate the answer.
"""

from evoprune.suggestions import door

__getattr__, __dir__, __all__ = door(__name__, __file__)
