"""Models from the Hugging Face hub: checked quickly, then downloaded into the hub's own cache."""

import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from evoprune.errors import ModelError, first_line

HUB_SECONDS = 5.0
FILES = ["*.json", "*.jinja", "merges.txt", "*.safetensors"]
SETTINGS = ["config.json", "*processor_config.json"]
MODEL_HINT = (
    "evoprune runs Qwen2.5-VL and Qwen2-VL checkpoints, such as Qwen/Qwen2.5-VL-3B-Instruct, and the bundled demos"
)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)


def is_id(name: str) -> bool:
    """Whether a name has the form of a hub id, `org/name`."""
    return bool(_ID.fullmatch(name)) and ".." not in name and "--" not in name


def kind_hint(name: str) -> str:
    """The beginning of a hint: which models run, where the name does not look like one of them; else nothing."""
    return "" if re.search(r"qwen-?2[._]?5?[-_]?vl", name, re.IGNORECASE) else f"{MODEL_HINT}; "


def download(
    name: str, revision: str | None, offline: bool, files: list[str], check: Callable[[Path], Any]
) -> tuple[Path, str]:
    """A hub model's folder in the hub's own cache, downloaded as far as needed and possible, and its commit.

    Args:
        name: `org/name`.
        files: patterns of the files to download.
        check: called with the config's path before anything large is downloaded; raises if the model cannot run.

    Raises:
        ModelError: no such model or revision, no access, or the hub is out of reach and the cache does not hold it.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    unreachable = "the hub may not be asked (offline)" if offline else None
    if not offline:
        # One request without retries shows whether hub and model exist; the library's own calls retry for minutes.
        url = hub.hf_hub_url(name, "config.json", revision=revision)
        try:
            _within(HUB_SECONDS, lambda: hub.get_hf_file_metadata(url, timeout=HUB_SECONDS))
        except errors.RevisionNotFoundError as problem:
            raise ModelError(f"{name} has no revision {revision!r} on the hub", "leave the revision out") from problem
        except errors.RepositoryNotFoundError as problem:  # also: private, or gated
            hint = f"check the spelling, or log in with `hf auth login` if it is private or gated; {MODEL_HINT}"
            raise ModelError(f"there is no folder {name} here, and no such model on the hub for you", hint) from problem
        except errors.EntryNotFoundError as problem:
            raise ModelError(f"{name} has no config.json on the hub", MODEL_HINT) from problem
        except Exception as problem:  # the HTTP library below differs from version to version
            unreachable = f"the hub cannot be reached ({first_line(problem)})"

    def fetch(*patterns: str) -> Path:
        local = unreachable is not None
        try:
            return Path(hub.snapshot_download(name, revision=revision, allow_patterns=patterns, local_files_only=local))
        except Exception as problem:
            if local:
                download = f"hf download {name} --local-dir DIR"
                network = f"where there is a network: {download}; then DIR is the model. The demo needs neither"
                hint = kind_hint(name) + network
                raise ModelError(f"{name} is not in the local cache, and {unreachable}", hint) from problem
            raise ModelError(
                f"the download of {name} broke off: {first_line(problem)}", "run it again to go on"
            ) from problem

    # Checked before gigabytes are downloaded.
    check(fetch("config.json") / "config.json")
    folder = fetch(*files)
    return folder, folder.name


def cached_folder(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model in the hub's own cache, if its config is there; no network is used."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    found = hub.try_to_load_from_cache(name, "config.json", cache_dir=constants.HF_HUB_CACHE, revision=revision)
    return Path(found).parent if isinstance(found, str) else None


def _within(seconds: float, work: Callable[[], Any]) -> Any:
    """`work()`, or TimeoutError. HTTP timeouts leave out name resolution, which alone can take half a minute."""
    answer = queue.SimpleQueue()

    def run():
        try:
            answer.put((work(), None))
        except BaseException as problem:
            answer.put((None, problem))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, problem = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s") from None
    if problem is not None:
        raise problem
    return result
