"""Synthetic worlds for the bundled demo models: generators of clips and questions (`write`), `samples/`, and training (`train`)."""
