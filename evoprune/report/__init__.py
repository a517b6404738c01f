"""What a question measured: `records` are the plain dataclasses, `stats` their lines of text, `warning_texts` what warnings say."""
