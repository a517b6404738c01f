"""What tests of loading share."""

import json
from functools import partial

import pytest

from evoprune.errors import ModelError
from evoprune.session.loading import model

# Weights are compared with those in the file, so they must stay readable.
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


def no_network(*_):
    raise AssertionError("the network was used")
