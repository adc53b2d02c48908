"""Rows on disk, a part at a time: the bytes are those that numpy writes, the columns those of the whole."""

import io

import numpy as np
import pytest

from loopmdm.model.corpora import rows

ROW = np.dtype([("hash", ">u8", (2,)), ("file", "i4"), ("characters", "i8")])


def made() -> np.ndarray:
    found = np.zeros(40, ROW)
    found["hash"] = np.random.default_rng(0).integers(0, 2**64, (40, 2), np.uint64)
    found["file"] = found["characters"] = np.arange(40)
    return found


@pytest.mark.parametrize("size", [1, 7, 100])
def test_rows_are_read_and_written_in_parts(tmp_path, monkeypatch, size):
    monkeypatch.setattr(rows, "AT_A_TIME", size)
    found, path, whole = made(), tmp_path / "it.npy", io.BytesIO()
    rows.save_columns(path, ROW, {field: found[field] for field in ROW.names or ()})
    np.save(whole, found)
    assert path.read_bytes() == whole.getvalue()
    assert [*map(len, rows.read_rows(path))] == [*[size] * (40 // size), *[40 % size] * (40 % size > 0)]
    with rows.spilled(rows.read_rows(path), ROW, tmp_path) as again:
        assert not {*tmp_path.iterdir()} - {path}
        for _ in range(2):
            assert np.concatenate([*again()], dtype=ROW).tobytes() == found.tobytes()
    for most, dtype in ((0, np.int8), (127, np.int8), (128, np.int16), (2**31 - 1, np.int32), (2**31, np.int64)):
        found["characters"][5] = most
        known = rows.column(iter([found[:5], found[5:]]), "characters")
        assert known.tolist() == found["characters"].tolist() and known.dtype == dtype
    assert rows.column(iter([]), "tokens").tolist() == []
