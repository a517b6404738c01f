"""Imports without garbage collection."""

import gc

import pytest

from evoprune_cli.loading import without_collections


def test_collections_go_on_afterwards():
    with pytest.raises(ImportError), without_collections():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()


def test_collections_that_were_off_stay_off():
    gc.disable()
    try:
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
