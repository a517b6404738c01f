"""Render chat templates in a separate process with resource limits.

A template is a program from an untrusted source. Jinja's sandbox prevents it from accessing files and Python internals, but it can
still run forever or use up all memory, even within a single uninterruptible operation. Templates are therefore rendered in a
separate process, which is killed if it exceeds its limits. Starting that process takes only slightly longer than importing Jinja.
"""

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

from evoprune.language.isolation import run_isolated

SECONDS = 5  # time limit for rendering, which typically takes milliseconds
MAX_CHARACTERS = 2**20  # maximum length of the rendered text, with placeholders for user input


def render(source: str, variables: dict[str, Any]) -> str:
    """Render a Jinja template.

    Args:
        source: The template source.
        variables: The template variables, which must be JSON-serializable.

    Raises:
        ValueError: If the template is broken, rejects the variables, takes too much time or memory, or renders too much text. The
            error message includes the reason.
        OSError: If the process cannot be started.
    """
    request = json.dumps({"source": source, "variables": variables})
    if "strftime_now" in source:  # the result depends on the time
        return _rendered(request, SECONDS)
    return _cached(request, SECONDS)


@lru_cache(maxsize=16)
def _cached(request: str, seconds: int) -> str:
    return _rendered(request, seconds)


def _rendered(request: str, seconds: int) -> str:
    answer = run_isolated(render_request, request, seconds, "jinja2.sandbox")
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer["text"]


def render_request(request: str) -> dict[str, str]:
    """Render the template in a JSON request. Return a dict with either the rendered `text` or an `error` message."""
    request = json.loads(request)
    try:
        text = _compiled(request["source"]).render(**request["variables"])
    except MemoryError:
        return {"error": "it takes too much memory"}
    except RecursionError:
        return {"error": "it is nested too deeply"}
    except Exception as problem:  # a template is a program that can raise any exception
        return {"error": (str(problem).strip() or type(problem).__name__).splitlines()[0][:200]}
    if len(text) > MAX_CHARACTERS:
        return {"error": f"its output has {len(text):,} characters, more than {MAX_CHARACTERS:,}"}
    return {"text": text}


def _compiled(source: str):
    """Compile a template using the same tags, filters, functions, and whitespace rules as in transformers."""
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """The `{% generation %}` tag, which marks the model's text for training. Its body is rendered unchanged."""

        tags = {"generation"}  # noqa: RUF012 (as Jinja declares it)

        def parse(self, parser):
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    class SafeNamespace(Namespace):
        """Jinja's `namespace`, except that it rejects names with a leading underscore."""

        def __init__(*args, **kwargs):  # no `self`, because a template may use that name as a keyword
            self, *given = args
            Namespace.__init__(self)
            for name, value in dict(*given, **kwargs).items():
                SafeNamespace.__setitem__(self, name, value)

        def __setitem__(self, name, value):
            if str(name).startswith("_"):
                raise SecurityError(f"a name in a namespace must not start with an underscore: {name!r}")
            Namespace.__setitem__(self, name, value)

    class Dict:
        """Lets templates call `dict` without access to the attributes of the class."""

        def __call__(self, *args, **kwargs):
            return dict(*args, **kwargs)

        def fromkeys(self, *args):
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        kwargs = {"ensure_ascii": ensure_ascii, "indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(value, **kwargs)

    extensions = [Generation, loopcontrols]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": Dict(),
        "namespace": SafeNamespace,
    }
    return environment.from_string(source)
