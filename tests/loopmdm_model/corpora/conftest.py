"""Tests of corpora leave the user's cache alone."""

import pytest

from loopmdm.model.corpora import hub, index, texts


def split_of(text: str) -> str | None:
    """What a text of the hub is held out for, if it is."""
    parts = [*index.scan([texts.Text(0, 0, iter([text]))])]
    return next((split for split in hub.HELD_OUT if len(hub._positions(parts.__iter__, split))), None)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """A cache of each test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("LOOPMDM_CACHE", str(folder))
    return folder
