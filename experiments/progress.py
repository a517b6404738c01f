"""Format an evaluation's progress as log lines. Imported by other experiments; not a script."""


def progress_line(what: str, done: int = 0, total: int = 0, detail: str = "") -> str:
    """Format the arguments of the `progress` callback of `Evaluation.run` as a log line."""
    if not total:
        return what
    return f"{what} {done} of {total}: {detail}"
