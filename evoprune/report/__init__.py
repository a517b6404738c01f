"""What a question measured: `records` are the plain dataclasses, `stats` their lines of text, and what the warnings say."""
