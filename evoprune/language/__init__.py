"""Answer a question about visual tokens: tokenizer, prompt, positions, and the language model's forward pass.

`prompt` builds a prompt, `pruned` prunes it, and `generate` reads it and generates the answer. `generate` runs `decoder` or
`hosted`, and `static` on CUDA.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.language import generate, hybrid, static
    from evoprune.language.answer import AnswerStream
    from evoprune.language.decoder import KVCache, forward
    from evoprune.language.generate import (
        PrefillState,
        TokenStream,
        dropping_for,
        embed_ids,
        layers_of,
        new_cache,
        prefill,
        teacher_forced_logits,
    )
    from evoprune.language.guidance import Vocabulary
    from evoprune.language.hosted import run_for, run_modules
    from evoprune.language.prefix import PrefixCache
    from evoprune.language.prompt import (
        CONTENTS,
        MARKERS,
        Place,
        Prompt,
        Tokenizer,
        build_prompt,
        has_tokenizer,
        load_tokenizer,
        place_of_pairs,
        prompt_positions,
        timestamps,
        video_positions,
    )
    from evoprune.language.pruned import PrunedPrompt, prune_prompt
    from evoprune.language.settings import GenerationOptions
    from evoprune.language.static import MIN_COLUMNS, NativeStaticCache, step
    from evoprune.language.turns import Placed, Turn

__all__ = [
    "CONTENTS",
    "MARKERS",
    "MIN_COLUMNS",
    "AnswerStream",
    "GenerationOptions",
    "KVCache",
    "NativeStaticCache",
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
    "build_prompt",
    "dropping_for",
    "embed_ids",
    "forward",
    "generate",
    "has_tokenizer",
    "hybrid",
    "layers_of",
    "load_tokenizer",
    "new_cache",
    "place_of_pairs",
    "prefill",
    "prompt_positions",
    "prune_prompt",
    "run_for",
    "run_modules",
    "static",
    "step",
    "teacher_forced_logits",
    "timestamps",
    "video_positions",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "answer": ["AnswerStream"],
        "decoder": ["KVCache", "forward"],
        "generate": [
            "PrefillState",
            "TokenStream",
            "dropping_for",
            "embed_ids",
            "layers_of",
            "new_cache",
            "prefill",
            "teacher_forced_logits",
        ],
        "guidance": ["Vocabulary"],
        "hosted": ["run_for", "run_modules"],
        "prefix": ["PrefixCache"],
        "prompt": [
            "CONTENTS",
            "MARKERS",
            "Place",
            "Prompt",
            "Tokenizer",
            "build_prompt",
            "has_tokenizer",
            "load_tokenizer",
            "place_of_pairs",
            "prompt_positions",
            "timestamps",
            "video_positions",
        ],
        "pruned": ["PrunedPrompt", "prune_prompt"],
        "settings": ["GenerationOptions"],
        "static": ["MIN_COLUMNS", "NativeStaticCache", "step"],
        "turns": ["Placed", "Turn"],
    },
)
