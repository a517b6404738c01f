"""The image: what it is built from is there. It is built and tried where Docker answers."""

import subprocess

import pytest

from experiments.environments import docker
from experiments.environments.recipes import ROOT


def test_what_the_image_is_built_from():
    sent = docker.sent()
    assert all((ROOT / path).exists() for path in sent)
    names = {path.as_posix() for path in sent}
    assert {"evoprune", "evoprune_cli", "plugins/serve", "pyproject.toml", "constraints.txt"} <= names
    assert not {"tests", "experiments", "samples", "results"} & names
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert docker.INSTALL in text and docker.CPU in text
    subprocess.run(["sh", "-n", str(ROOT / docker.INSTALL)], check=True)


def test_what_the_image_runs():
    assert docker.instruction("ENTRYPOINT")[:2] == ["evoprune", "serve"]
    python, option, code = docker.instruction("HEALTHCHECK")
    assert (python, option) == ("python", "-c") and str(docker.PORT) in code
    compile(code, "check", "exec")
    assert "\nUSER evoprune\n" in (ROOT / "Dockerfile").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.skipif(not docker.has_docker(), reason="no Docker answers: python -m experiments.environments.docker")
def test_the_image_is_built_asked_and_ended():
    assert docker.main([]) == 0
