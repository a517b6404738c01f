"""Helpers for the tests that load models."""

import json
import os
from dataclasses import replace
from functools import partial

import pytest
import torch

from evoprune.errors import ModelError
from evoprune.session.loading import model

# Tests compare weights with those in the file, so the weights must stay readable.
load_model = partial(model.load_model, pack=False)


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def error_of(name, **options):
    with pytest.raises(ModelError) as caught:
        load_model(str(name), **options)
    assert caught.value.exit_code == 4
    assert caught.value.stage == "load"
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value.message


def delete_when_mapped(monkeypatch):
    """Delete the safetensors file after its header was read and before torch opens it by name, as another process might."""
    from_file = torch.UntypedStorage.from_file

    def deleted(name, *args, **kwargs):
        os.unlink(name)
        return from_file(name, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", deleted)


def described(loaded, **changes):
    """Return the same model with other fields in its description."""
    return replace(loaded, description=replace(loaded.description, **changes))


def no_network(*_):
    raise AssertionError("the network was used")
