"""Hints about mistakes on the command line, such as an unknown command or option. Imported only after a mistake."""

import os
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from typer.core import TyperCommand

from evoprune.suggestions import other_name
from evoprune.util import looks_like_input
from evoprune_cli.options import EXAMPLE, long_flags
from evoprune_cli.typed import typed
from evoprune_cli.words import ASK

# Words that users may type instead of a command name, with a hint for each word.
MODELS_HINT = "evoprune models lists the models on this machine; every command takes -m MODEL"
COMMAND_HINTS = {
    **dict.fromkeys(("help", "h", "man", "usage"), "evoprune --help, or evoprune COMMAND --help"),
    **dict.fromkeys(("version", "v"), "evoprune --version"),
    **dict.fromkeys(("model", "pull", "download"), MODELS_HINT),
    **dict.fromkeys(("list", "ls", "method"), "evoprune methods lists the methods; " + MODELS_HINT),
    **dict.fromkeys(("run", "query", "question", "describe", "caption", "answer", "prune"), ASK),
    **dict.fromkeys(("search", "grep", "moments", "locate"), 'evoprune find video.mp4 "a red circle" finds moments'),
    **dict.fromkeys(("chat", "talk", "interactive"), "evoprune ask video.mp4 -i opens a prompt for questions"),
    **dict.fromkeys(
        ("live", "stream", "camera", "listen"), 'evoprune watch rtsp://HOST/PATH -Q "Who is there?" --every 30s'
    ),
    **dict.fromkeys(
        ("serve", "server", "api"),
        "install it in a checkout: pip install ./plugins/serve; for many users, use evoprune's vLLM plugin",
    ),
    **dict.fromkeys(("mcp", "agent", "agents"), "install it in a checkout: pip install ./plugins/mcp"),
    **dict.fromkeys(
        ("info", "show", "probe", "doctor", "env", "cache"), "evoprune inspect, with a video, -m MODEL or neither"
    ),
    **dict.fromkeys(("check", "test", "selftest"), "evoprune verify compares with plain transformers"),
    **dict.fromkeys(
        ("bench", "benchmark", "time", "speed"), "evoprune profile measures time, evoprune eval measures accuracy"
    ),
    **dict.fromkeys(
        ("evaluate", "score", "compare"), "evoprune eval --data FILE; for one video evoprune ask --compare"
    ),
    **dict.fromkeys(("completion", "completions"), "evoprune --install-completion"),
}

# Examples for hints, of commands whose docstrings begin with other ones.
EXAMPLES = {"ask": ASK}
GENERAL_VALUES = {"auto", "none", "on", "off", "text", "full"}  # values of several options, which suggest none of them


def hint_of(problem: Exception, word: str | None, known: Sequence[str]) -> str:
    """Return a hint for an error of the parser.

    Args:
        word: The word typed in place of a command.
        known: The names of all commands.
    """
    command, words = typed().command, typed().words
    text = problem.format_message()
    if command is None:
        if near := get_close_matches(getattr(problem, "option_name", ""), ("--version", "--help"), 1):
            return f"did you mean {near[0]}?"
        return _suggestion(word, known) or "see evoprune --help"
    dashed = [word for word in words if word.startswith("-") and os.path.exists(word)]
    if dashed and "--" not in words:
        return f"if you mean the file, write ./{dashed[0]}"
    if "unexpected extra argument" in text and "--" in words:
        return "words after -- are not options: put options before it"
    if command == "watch" and "unexpected extra argument" in text:
        return 'put -Q before a question: evoprune watch SOURCE -Q "What happens?"'
    if "Missing argument" in text and (example := EXAMPLES.get(command) or example_of(problem.ctx.command)):
        return example
    see = f"see evoprune {command} --help-all"
    if "No such option" in text:
        if problem.option_name == "--version":
            return COMMAND_HINTS["version"]
        return option_hint(problem.option_name, problem.ctx) + see
    return see


def _suggestion(word: str | None, known: Sequence[str]) -> str:
    """Return a hint that suggests a command with a meaning or name similar to a word, or "" if there isn't one."""
    if word is None:
        return COMMAND_HINTS["version"] if typed().words[:1] in (["-V"], ["-v"], ["-version"]) else ""
    if looks_like_input(word):
        return f"to ask about a video: {ASK}"
    word = word.lower()
    near = [word] if word in COMMAND_HINTS else get_close_matches(word, [*known, *COMMAND_HINTS], 1)
    if not near:
        return ""
    return COMMAND_HINTS.get(near[0]) or f"did you mean evoprune {near[0]}? see evoprune --help"


def example_of(command: TyperCommand) -> str | None:
    """Return the first example in a command's help, or None if there isn't one."""
    return next(
        (line.strip() for line in EXAMPLE.findall(command.help or "") if line.strip().startswith("evoprune ")), None
    )


def option_hint(flag: str, context: Any) -> str:
    """Return the start of a hint that suggests the right option for an unknown one, or an empty string.

    Suggestions are, in this order: an option with this name in other libraries; an option that takes the name as its value; the
    same option of another command; an option with a similar name; an option that takes a part of the name as its value (`-b fast`
    for --answer-fast).
    """
    name = flag.lstrip("-").replace("-", "_").lower()
    flags = long_flags(context.command.params)
    values = {
        item.value: f"{max(param.opts, key=len)} {item.value}"
        for param in context.command.params
        for item in param.shell_complete(context, "")
        if item.value not in GENERAL_VALUES
    }
    if found := other_name(name, flags):
        option, _, value = found.partition("=")
        return f"did you mean {' '.join([flags[option], value.strip(chr(39))]).strip()}? "
    if name in values:
        return f"did you mean {values[name]}? "
    for other in context.parent.command.commands.values():
        if name in long_flags(other.params):
            return f"{flag} is an option of evoprune {other.name}; "
    near = [flags[each] for each in get_close_matches(name, flags, 1)]
    near += [values[part] for part in name.split("_") if part in values]
    return f"did you mean {near[0]}? " if near else ""
