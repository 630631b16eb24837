from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles.core.errors import DataError
from miles.rollout.data import DataPath, open_rows, parse_paths


def test_a_path_may_carry_a_slice() -> None:
    assert parse_paths("a.jsonl@[10:20]") == [DataPath(Path("a.jsonl"), slice(10, 20))]
    assert parse_paths("a.jsonl@[:-5]") == [DataPath(Path("a.jsonl"), slice(None, -5))]
    assert parse_paths("/x@y/a.jsonl") == [DataPath(Path("/x@y/a.jsonl"))]


def test_several_paths_are_separated_by_commas() -> None:
    assert parse_paths("a.jsonl@[:3], b.parquet") == [
        DataPath(Path("a.jsonl"), slice(None, 3)),
        DataPath(Path("b.parquet")),
    ]


def test_jsonl_rows_know_their_lines_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \n{"a": 2}\r\n7\n{"a": 3}')
    rows = open_rows(DataPath(path), ())
    assert [rows[0], rows[1], rows[3]] == [{"a": 1}, {"a": 2}, {"a": 3}]
    assert rows.where(1) == f"{path}:4"
    with pytest.raises(ValueError, match="expected a JSON object, found int"):
        rows[2]


@given(
    lines=st.lists(st.text(max_size=8).map(lambda text: json.dumps({"t": text})) | st.sampled_from(["", " ", "\t "])),
    start=st.none() | st.integers(-5, 5),
    stop=st.none() | st.integers(-5, 5),
)
def test_rows_of_a_slice_are_the_slice_of_the_rows(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], start: int | None, stop: int | None
) -> None:
    path = tmp_path_factory.mktemp("slices") / "a.jsonl"
    path.write_text("\n".join(lines))
    rows = open_rows(DataPath(path, slice(start, stop)), ())
    expected = [json.loads(line) for line in lines if line.strip()][start:stop]
    assert [rows[index] for index in range(len(rows))] == expected


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.touch()
    assert len(open_rows(DataPath(path), ())) == 0


def test_parquet_rows_hold_the_asked_columns_without_nulls(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a": [1, 2, 3, 4], "b": ["x", None, "z", "w"], "huge": [0, 0, 0, 0]}), path)
    rows = open_rows(DataPath(path, slice(1, 3)), {"a", "b"})
    assert [rows[index] for index in range(len(rows))] == [{"a": 2}, {"a": 3, "b": "z"}]
    assert rows.where(0) == f"{path}: row 2"


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("missing.jsonl", None, "no such file"),
        ("a.csv", b"a,b", "cannot read .csv"),
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes | None, complaint: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{complaint}"):
        open_rows(DataPath(path), ())
