"""A chat template, rendered in a process of its own.

A template is a program from an untrusted source. Jinja's sandbox keeps it from files and from Python's insides, but not from
running for ever or from filling the memory, and a single operation of it may do either where no signal is seen. So another
process renders it under limits, and is ended if need be. Starting that process takes little longer than importing Jinja here.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from evoprune.language.apart import apart

SECONDS = 5  # a real template takes milliseconds, and the imports before it a tenth of a second
MAX_CHARACTERS = 2**20  # of what is rendered, in which the user's words are placeholders


def render(source: str, variables: dict[str, Any]) -> str:
    """Return what a template (Jinja) makes of variables, which are plain data for JSON.

    Raises:
        ValueError: the template is broken, refuses the variables, or takes or makes too much; the message says which.
        OSError: no process can be started.
    """
    return _cached(json.dumps({"source": source, "variables": variables}), SECONDS)


@lru_cache(maxsize=16)
def _cached(request: str, seconds: int) -> str:
    answer = apart(answer_of, request, seconds, "jinja2.sandbox")
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]


def answer_of(request: str) -> dict[str, str]:
    """Return the answer to a request: `text`, or `error`."""
    request = json.loads(request)
    try:
        text = _compiled(request["source"]).render(**request["variables"])
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as problem:  # a template is a program, and may raise anything
        return {"error": (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"it makes {len(text):,} characters, more than {MAX_CHARACTERS:,}"}
    return {"text": text}


def _compiled(source: str):
    """Return the template in an environment like that of transformers: the same tags, filters, functions and line breaks."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what a model writes, for training; what is inside is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser):
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class Names(Namespace):
        """`namespace`, which stores no name that begins with an underscore."""

        def __init__(*args, **kwargs):  # so that a name may be `self`
            self, *given = args
            Namespace.__init__(self)
            for name, value in dict(*given, **kwargs).items():
                Names.__setitem__(self, name, value)

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a namespace stores no names with an underscore before them: {name!r}")
            Namespace.__setitem__(self, name, value)

    class Dict:
        """`dict` without the attributes of a class."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        kwargs = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, **kwargs)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": Names,
    }
    return environment.from_string(source)
