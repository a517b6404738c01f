"""Answer questions about visual tokens, from tokenizing the prompt to generating the answer.

`Prompt.build` builds a prompt, `prune_prompt` removes the pruned tokens, and `LanguageModel.prefill` or a `PrefixCache` reads the
remaining tokens. The resulting `PrefillState` is then used by an `AnswerStream` to generate the answer.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.language.answer import AnswerStream, TokenStream
    from evoprune.language.generate import LanguageModel, PrefillState
    from evoprune.language.guidance import Vocabulary
    from evoprune.language.prefix import PrefixCache
    from evoprune.language.prompt import (
        Place,
        Prompt,
        Tokenizer,
        prompt_positions,
        timestamps,
        video_positions,
    )
    from evoprune.language.pruned import PrunedPrompt, prune_prompt
    from evoprune.language.settings import GenerationOptions
    from evoprune.language.turns import Placed, Turn
    from evoprune.language.warming import warm_up

__all__ = [
    "AnswerStream",
    "GenerationOptions",
    "LanguageModel",
    "Place",
    "Placed",
    "PrefillState",
    "PrefixCache",
    "Prompt",
    "PrunedPrompt",
    "TokenStream",
    "Tokenizer",
    "Turn",
    "Vocabulary",
    "prompt_positions",
    "prune_prompt",
    "timestamps",
    "video_positions",
    "warm_up",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "answer": ["AnswerStream", "TokenStream"],
        "generate": ["LanguageModel", "PrefillState"],
        "guidance": ["Vocabulary"],
        "prefix": ["PrefixCache"],
        "prompt": [
            "Place",
            "Prompt",
            "Tokenizer",
            "prompt_positions",
            "timestamps",
            "video_positions",
        ],
        "pruned": ["PrunedPrompt", "prune_prompt"],
        "settings": ["GenerationOptions"],
        "turns": ["Placed", "Turn"],
        "warming": ["warm_up"],
    },
)
