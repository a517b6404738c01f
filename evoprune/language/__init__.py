"""From a question and visual tokens to an answer: tokenizer, prompt, positions, and the language model's forward pass.

The order of use: `prompt`, `generate`, which runs `decoder` and, on CUDA, `static`.
"""
