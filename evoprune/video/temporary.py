"""Temporary files, which readers open because they seek, in a process of their own."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from evoprune.errors import VideoError


@contextmanager
def temporary(chunks: Iterable[bytes], name: str, file_name: str = "input") -> Iterator[str]:
    """Yields the path of a temporary file of these bytes, which errors call `name`. Raises VideoError: it cannot be stored."""
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="evoprune-"))
            path = os.path.join(folder, file_name)
            with open(path, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
        except OSError as error:
            hint = "set TMPDIR to a folder with room for it"
            raise VideoError(f"cannot store {name}: {error.strerror or error}", hint) from error
        with named({path: name}):
            yield path


@contextmanager
def named(files: Mapping[str, str]) -> Iterator[None]:
    """Has errors about files, by path, say their names: a user does not know a temporary file."""
    try:
        yield
    except VideoError as problem:
        for path, name in files.items():
            problem.message = problem.message.replace(path, name)
        raise
