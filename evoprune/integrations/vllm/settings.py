"""How a server prunes: `--video-pruning-rate` and `--additional-config`, and budgets of requests. No vLLM here."""

from collections.abc import Mapping
from typing import Any

from evoprune import methods
from evoprune.errors import UsageError, names_plugins
from evoprune.methods.budget import parse_budget
from evoprune.methods.chain import Pipeline
from evoprune.text import did_you_mean

SECTION, METHOD = "evoprune", "method"  # --additional-config '{"evoprune": {"method": "divprune"}}'
BUDGET = "evoprune_budget"  # in a request's mm_processor_kwargs
EXAMPLE = '--additional-config \'{"evoprune": {"method": "divprune"}}\''
EXACT = "choose evoprune, evoprune-merge, tome, divprune or another exact method"


def method_of(additional: Any) -> Pipeline:
    """The method that `--additional-config` names, or the default. Raises as `served_method`; UsageError: an unknown key."""
    section = additional.get(SECTION, {}) if isinstance(additional, Mapping) else {}
    unknown = sorted(set(section) - {METHOD}) if isinstance(section, Mapping) else [str(section)]
    if unknown:
        raise UsageError(f"{SECTION} in --additional-config has no setting {unknown[0]!r}", f"for example {EXAMPLE}")
    return served_method(section.get(METHOD, methods.DEFAULT))


@names_plugins()
def served_method(name: str) -> Pipeline:
    """The method `name`, perhaps with settings (`NAME:SETTING=VALUE`). Raises UsageError: there is none, or it cannot work here."""
    if not isinstance(name, str):
        raise UsageError(f"method {name!r} is not a name", f"for example {EXAMPLE}")
    method = methods.parse(name)
    if method.acts == "none":
        raise UsageError(f"method {name} prunes nothing", "leave --video-pruning-rate out instead")
    if method.acts == "input":
        raise UsageError(f"method {name} acts on frames, which vLLM reads and resizes", EXACT)
    if method.language:
        raise UsageError(f"method {name} acts inside the language model, which is vLLM's", EXACT)
    if method.reads_question:
        raise UsageError(f"{method.reading[0]}, and vLLM's encoder does not see it", EXACT)
    if not method.exact:
        raise UsageError(f"method {name} does not say in advance how many tokens it keeps", EXACT)
    return method


def served_budget(rate: float | None) -> float:
    """The share of visual tokens that stays, from `--video-pruning-rate`; 1.0 without one."""
    return round(1 - (rate or 0.0), 9)


def request_budget(options: Mapping[str, Any], rate: float | None) -> float:
    """The share of visual tokens that stays in a request, by its `mm_processor_kwargs` and the server's rate. Raises UsageError."""
    unknown = [name for name in options if name.startswith("evoprune_") and name != BUDGET]
    if unknown:
        raise UsageError(f"no option {unknown[0]!r}", f"{did_you_mean(unknown[0], [BUDGET])}a request may set {BUDGET}")
    if BUDGET not in options:
        return served_budget(rate)
    budget = parse_budget(options[BUDGET])
    if budget < 1 and not rate:
        hint = "start it with --video-pruning-rate, which may be as small as 1e-9, and set budgets in requests"
        raise UsageError("this server prunes nothing, for it was started without a rate", hint)
    return budget


def without_own(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are the Hugging Face processor's."""
    return {name: value for name, value in options.items() if name != BUDGET}
