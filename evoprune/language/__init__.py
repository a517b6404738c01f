"""From visual tokens and a question to an answer: prompt, positions, prefill and streamed decoding."""
