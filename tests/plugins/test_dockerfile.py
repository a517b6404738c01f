"""The server image is built from existing files and runs the server."""

import json
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")


def instruction(name: str) -> list[str]:
    (found,) = re.findall(rf"^{name} .*?(\[.*\])$", DOCKERFILE, re.M)
    return json.loads(found)


def test_what_the_image_is_built_from():
    sent = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert all((ROOT / path).exists() for path in sent)
    assert {"evoprune", "evoprune_cli", "plugins/serve", "pyproject.toml", "constraints.txt"} <= sent
    assert "plugins/serve/install.sh" in DOCKERFILE
    subprocess.run(["sh", "-n", str(ROOT / "plugins/serve/install.sh")], check=True)


def test_what_the_image_runs():
    assert instruction("ENTRYPOINT")[:2] == ["evoprune", "serve"]
    python, option, code = instruction("HEALTHCHECK")
    assert (python, option) == ("python", "-c")
    compile(code, "check", "exec")
    assert "\nUSER evoprune\n" in DOCKERFILE
