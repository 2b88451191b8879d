from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from lightrft.data import Source

RECORDS = [{"input": "a?", "reference": "1"}, {"input": "b?", "reference": "2"}]
Write = Callable[..., str]


def rows(source: Source) -> list[Any]:
    records = source.load()
    return [records[row] for row in range(len(records))]


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "saved", "saved with splits", "repository"])
def test_every_kind_of_local_data_gives_the_same_records(kind: str, tmp_path: Path) -> None:
    table = datasets.Dataset.from_list(RECORDS)
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(RECORDS, indent=1))
    elif kind == "jsonl":
        path.write_text("\n\n".join(map(json.dumps, RECORDS)))
    elif kind in ("csv", "parquet"):
        getattr(table, f"to_{kind}")(path)
    elif kind == "saved":
        table.save_to_disk(path)
    elif kind == "saved with splits":
        datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(path)
        assert rows(Source(str(path), split="test")) == RECORDS[:1]
    else:
        path.mkdir()
        table.to_parquet(path / "train-00000-of-00001.parquet")
    assert rows(Source(str(path))) == RECORDS


def test_json_values_keep_their_spelling(write: Write) -> None:
    values = [1, 2.5, "2020-01-02", 10**30, True, "007", None, [1, "x"]]
    assert [row["v"] for row in rows(Source(write([{"v": value} for value in values])))] == values
    assert [row["v"] for row in rows(Source(write([{"v": value} for value in values], "list.json")))] == values


def test_json_lines_may_be_in_a_json_file_with_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.json"
    for mark in (b"\xef\xbb\xbf", b"\xef\xbb\xbf\n  "):
        path.write_bytes(mark + b'{"input": "\xc3\xa9"}\r\n\r\n{"input": "b"}')
        assert rows(Source(str(path))) == [{"input": "é"}, {"input": "b"}]


def test_csv_cells_of_named_columns_are_text_and_only_empty_ones_are_missing(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text('input,reference,level\n"two\nlines",007,1\nNA,None,2\nc,,3\nd,1.50,4\n')
    assert rows(Source(str(path))) == [
        {"input": "two\nlines", "reference": "007", "level": 1},
        {"input": "NA", "reference": "None", "level": 2},
        {"input": "c", "reference": None, "level": 3},
        {"input": "d", "reference": "1.50", "level": 4},
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_glob_is_its_files_in_order_of_name(suffix: str, tmp_path: Path) -> None:
    for shard, record in reversed(list(enumerate(RECORDS))):
        table = datasets.Dataset.from_list([record])
        getattr(table, "to_parquet" if suffix == "parquet" else "to_json")(tmp_path / f"train-{shard}.{suffix}")
    source = Source(str(tmp_path / f"train-*.{suffix}"))
    assert (rows(source), source.name) == (RECORDS, "train")


def test_media_columns_stay_encoded(tmp_path: Path) -> None:
    image = Image.new("RGB", (2, 2))
    features = datasets.Features({"images": datasets.List(datasets.Image()), "one": datasets.Image()})
    table = datasets.Dataset.from_dict({"images": [[image, image]], "one": [image]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "table.parquet")
    for name in ("saved", "table.parquet"):
        (row,) = rows(Source(str(tmp_path / name)))
        assert row["one"]["bytes"].startswith(b"\x89PNG")
        assert [item["bytes"] for item in row["images"]] == [row["one"]["bytes"]] * 2


@pytest.mark.parametrize("path", ["none.jsonl", "./none", "/no/such/folder", "none-*.parquet", "a/b/c.csv"])
def test_what_is_not_there_is_one_sentence(path: str) -> None:
    with pytest.raises(FileNotFoundError, match=r"^There is no data file or folder .*; check the path\.$"):
        Source(path).load()


def test_a_hub_id_that_cannot_be_reached_says_so() -> None:
    with pytest.raises(FileNotFoundError, match=r"^nobody/nothing is neither a local path nor a Hugging Face data set"):
        Source("nobody/nothing").load()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("empty.jsonl", "\n\n", "holds no records"),
        ("empty.json", "[]", "holds no records"),
        ("cut.json", '[{"a": 1}, {"a"', "is not JSON"),
        ("broken.csv", 'a,b\n"x', "cannot be read"),
        ("broken.parquet", "not a table", "cannot be read"),
        ("notes.txt", "hello", r"is of kind \.txt; data files are one of"),
    ],
)
def test_files_that_cannot_be_read_are_named(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}.*{says}"):
        Source(str(tmp_path / name)).load()


def test_a_split_that_a_saved_folder_lacks_is_refused(tmp_path: Path) -> None:
    datasets.DatasetDict({"dev": datasets.Dataset.from_list(RECORDS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="has no split 'train'; its splits are dev"):
        Source(str(tmp_path / "saved")).load()


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"path": " "}, "needs a path"),
        ({"path": "a.jsonl", "split": "test"}, "has no splits"),
        ({"path": "a.jsonl", "subset": "main"}, "has no splits"),
        ({"path": "a.jsonl", "probability": 0.0}, "positive"),
        ({"path": "a.jsonl", "probability": float("nan")}, "positive"),
        ({"path": "a.jsonl", "label": "rule", "label_key": "kind"}, "ineffective"),
        ({"path": "a.jsonl", "format": "gsm8k", "input_key": "question"}, "remove them"),
    ],
)
def test_keys_without_effect_are_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Source(**keys)


def test_names_default_to_the_last_part_of_the_path() -> None:
    paths = {"a/b.jsonl": "b", "openai/gsm8k": "gsm8k", "data/": "data", "x/*.parquet": "data", "v1.5/set": "set"}
    assert {path: Source(path).name for path in paths} == paths
