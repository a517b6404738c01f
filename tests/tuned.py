"""What tests of tuned settings share."""

from dataclasses import replace

from evoprune.session.loading.folder import fingerprint
from evoprune.session.loading.found import find_model
from evoprune.session.options import ModelOptions
from evoprune.session.saved import Tuned, never_tuned, tuned

SETTING = Tuned(
    method="evoprune:depth=0.25",
    budget=0.2,
    model="demo",
    created_utc="2026-03-01T12:00:00+00:00",
    agree=0.95,
    agreement=0.97,
    low=0.955,
    first_token=0.3,
    videos=12,
    questions=36,
    version="0.1.0",
)
ORIGIN = {"created_utc": "2026-03-01T12:00:00+00:00", "agree": 0.95, "low": 0.955, "videos": 12, "questions": 36}


def mark_as_seen(folder):
    """Makes the commands not say that a model was never tuned."""
    found = find_model(ModelOptions(folder))
    never_tuned(fingerprint(str(folder), None, folder, found.files), lambda: found.weights_fingerprint)


def tune(model="demo", **changes) -> str:
    """Saves a setting for a model, as if it had been tuned; returns the fingerprint of its weights."""
    weights = find_model(ModelOptions(model)).weights_fingerprint
    tuned.save(weights, replace(SETTING, model=str(model), **changes))
    return weights
