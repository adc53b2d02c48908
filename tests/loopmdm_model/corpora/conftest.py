"""Tests of corpora leave the user's cache alone."""

import pytest


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache of each test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOOPMDM_CACHE", str(folder))
    return folder
