"""The worlds of the bundled demo models: generators of clips and questions (`write`), `samples/`, and the training (`train`)."""
