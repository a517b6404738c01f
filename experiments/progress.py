"""Progress of an evaluation as lines of a log. Imported by the experiments; not run by itself."""


def progress_line(what: str, done: int = 0, total: int = 0, detail: str = "") -> str:
    """Return the arguments that `Evaluation.run` gives its `progress` as a line for a log."""
    if not total:
        return what
    return f"{what} {done} of {total}: {detail}"
