"""Download models from the Hugging Face hub to the local cache, and suggest corrections for model names. Does not import torch."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from evoprune.errors import ModelError, first_line
from evoprune.model import FAMILIES
from evoprune.session.local_models import here_hint
from evoprune.session.published import BUNDLED_CONFIGS, MODEL_HINT, SERIES
from evoprune.util import listed

# Hub IDs of supported Qwen models that "did you mean" hints may suggest.
PUBLISHED = (*BUNDLED_CONFIGS, *(f"Qwen/{name}" for family in FAMILIES.values() for name in family.published))
SETTINGS = ("config.json", "*processor_config.json")  # files read by `describe`
HUB_SECONDS = 5.0
LONGEST_NAME = 200  # maximum number of characters of a name to correct; comparing longer ones would take seconds
_GGUF = re.compile(r"(^|[-_./])gguf($|[-_.])", re.IGNORECASE)
_MLX = re.compile(r"(^|[-_./])mlx($|[-_.])", re.IGNORECASE)
# Matches the name of a series, however it is punctuated: Qwen2.5-VL is also found in qwen25vl.
_SERIES = "|".join(name.replace("Qwen", "qwen-?").replace(".", "[._]?").replace("-VL", "[-_]?vl") for name in SERIES)
_KNOWN = re.compile(_SERIES, re.IGNORECASE)
_ORIGINAL = re.compile(
    rf"({'|'.join(map(re.escape, SERIES))})-([\d.]+b(-a\d+b)?|flash-next)(-instruct|-thinking)?", re.IGNORECASE
)


def nearest_id(name: str) -> str | None:
    """Suggest the published Qwen ID most similar to a hub ID that is misspelled or lacks an organization.

    Returns None if no published ID is similar enough, if the name is longer than `LONGEST_NAME`, if the hub ID belongs to another
    organization, or if it starts with a published ID, such as `...-AWQ`.
    """
    organization, _, word = name.lower().rpartition("/")
    if organization not in ("", "qwen") or not 0 < len(word) <= LONGEST_NAME:
        return None
    known = {each.lower().removeprefix("qwen/"): each for each in PUBLISHED}
    if any(name.startswith(each) for each in PUBLISHED):  # also true for variants, such as -AWQ
        return None

    def likeness(each: str) -> tuple[float, int]:
        same = sum(part(word) == part(each) for part in (_generation, _size))
        return SequenceMatcher(None, word, each).ratio() + 0.2 * same, -len(each)

    near = max([each for each in known if word in each] or known, key=likeness)
    return known[near] if word in near or likeness(near)[0] >= 0.9 else None


def _generation(word: str) -> str:
    return "".join(re.findall(r"^qwen-?([\d.]+)", word))


def _size(word: str) -> str:
    return "".join(re.findall(r"(?<![\d.])([\d.]+b)\b", word))


def near_hint(name: str) -> str:
    """Return a "did you mean" hint that suggests the `nearest_id`, or an empty string if there isn't one."""
    near = nearest_id(name)
    return f"did you mean {near}? " if near else ""


def kind_hint(name: str) -> str:
    """Return a hint if the name suggests a model that cannot be run under its hub ID; otherwise, return an empty string.

    For GGUF files, the hint says how to download and run them; for MLX weights, that they are not supported. For other models, it
    lists the supported models. The hint ends with a semicolon so that more text can follow.
    """
    if _GGUF.search(name):
        command = f'hf download {name} --include "*Q4_K_M*" "*mmproj*" --local-dir DIR'
        return f"evoprune runs GGUF files from a folder: {command}, then use DIR as the model; "
    if _MLX.search(name):
        instead = downloadable_id(name) or "the original checkpoint"
        return f"the name suggests MLX weights, which evoprune does not support; use {instead}; "
    if _KNOWN.search(name):
        return ""
    return f"{MODEL_HINT}; "


def name_hint(name: str, usual: str = "") -> str:
    """Return a hint for a hub ID that can't be found: the models on this machine, and the ID that may be meant, or `usual`."""
    return here_hint() + (near_hint(name) or usual or kind_hint(name))


def downloadable_id(name: str) -> str | None:
    """Return the hub ID to suggest in a download command, correcting misspelled names.

    For MLX weights, which evoprune cannot run, this is the original model's ID, or None if the original is unknown. It is also None
    for GGUF files, for which `kind_hint` has a command. For all other models, it is the `nearest_id`, or `name` itself if no
    published ID is similar.
    """
    if _GGUF.search(name):
        return None
    if _MLX.search(name):
        original = _ORIGINAL.search(name)
        return f"Qwen/{original[0]}" if original else None
    return nearest_id(name) or name


def revision_flag(revision: str | None) -> str:
    """Return the `hf download` flag for a revision, with a leading space, or an empty string if `revision` is None."""
    return "" if revision is None else f" --revision {revision}"


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Return a hub model's folder in the local cache, or None if its config.json isn't cached. Does not use the network."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    try:
        path = hub.try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except ValueError:  # not a valid hub ID, possibly because it is too long
        return None
    return Path(path).parent if isinstance(path, str) else None


def reach(name: str, revision: str | None, offline: bool) -> str | None:
    """Check whether the hub can be reached and contains a model.

    Returns:
        None if the hub can be reached; otherwise, the reason for use in an error message.

    Raises:
        ModelError: If the model or revision doesn't exist on the hub, or access is denied.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    if offline:
        return "network access is disabled (offline)"
    # Send a single request without retries, because the hub library's own functions keep retrying for minutes.
    url = hub.hf_hub_url(name, "config.json", revision=revision)
    try:
        _within(HUB_SECONDS, lambda: hub.get_hf_file_metadata(url, timeout=HUB_SECONDS))
    except errors.RevisionNotFoundError as problem:
        raise ModelError(f"{name} has no revision {revision!r} on the hub", "leave the revision out") from problem
    except errors.RepositoryNotFoundError as problem:  # the repository may exist but be private or gated
        hint = f"log in with `hf auth login` if it is private or gated; {MODEL_HINT}"
        hint = f"{name_hint(name, 'check the spelling, or ')}{hint}"
        raise ModelError(
            f"there is no folder {name} here, and the hub has no such model that you can access", hint
        ) from problem
    except errors.EntryNotFoundError as problem:
        which = near_hint(name) or kind_hint(name) or f"{MODEL_HINT}; "
        hint = f"{which}merge adapters first"
        raise ModelError(f"{name} has no config.json on the hub", hint) from problem
    except Exception as problem:  # the exceptions vary by huggingface_hub version
        return f"the hub cannot be reached ({first_line(problem)})"
    return None


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """Call `work` in a thread with a time limit, and return its result.

    Unlike an HTTP timeout, the time limit includes the DNS lookup, which can take half a minute.

    Raises:
        TimeoutError: If `work` doesn't return within `seconds`.
    """
    answer = Future()

    def run():
        try:
            answer.set_result(work())
        except BaseException as problem:
            answer.set_exception(problem)

    threading.Thread(target=run, daemon=True).start()
    if not wait([answer], seconds).done:
        raise TimeoutError(f"no response within {seconds:g} s")
    return answer.result()


def fetch(name: str, revision: str | None, patterns: tuple[str, ...], unreachable: str | None) -> Path:
    """Download all missing files of a hub model that match the patterns, and return the model's folder in the local cache.

    Args:
        unreachable: The reason why the hub cannot be reached (see `reach`), or None. If there is a reason, nothing is downloaded,
            so the files must already be in the local cache.

    Raises:
        ModelError: If the download fails, or if the hub cannot be reached and the model is not in the local cache.
    """
    import huggingface_hub as hub

    local = unreachable is not None
    try:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local))
    except Exception as problem:
        if local:
            wanted = name
            hint = name_hint(name)
            if revision is not None:
                wanted = f"{name} at revision {revision}"
                refs = Path(hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "refs"
                if held := sorted(file.name for file in refs.glob("*")):
                    hint += f"the cache has {listed(held)}; "
            if wanted_id := downloadable_id(name):
                command = f"hf download {wanted_id}{revision_flag(revision)} --local-dir DIR"
                hint += f"on a machine with network access: {command}; then use DIR as the model. The demo needs no download"
            else:
                hint += "the demo needs no download"
            raise ModelError(f"{wanted} is not in the local cache, and {unreachable}", hint) from problem
        broken = f"the download of {name} failed: {first_line(problem)}"
        raise ModelError(broken, "run the command again to resume") from problem
