"""Where records come from: what a user writes in YAML, and how the records are loaded."""

from __future__ import annotations

import glob
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightrft.data.json_records import load_json
from lightrft.samples import PART_OF

FILE_KINDS = (".json", ".jsonl", ".csv", ".parquet")


@dataclass
class DataSource:
    """A data set: files, a folder, or a Hugging Face hub id. Local data never touch the network.

    Args:
        path: a ``.json`` (list of records), ``.jsonl``, ``.csv`` or ``.parquet`` file or a glob of such; a folder saved
            with ``save_to_disk`` or laid out as a hub repository; or a hub id. Files are read as they are: JSON values
            keep their spelling, and the CSV columns named by a key are text (``007`` stays ``007``).
        split: split of a hub id or folder; slices as ``train[:100]`` are for hub ids and repository folders.
        subset: configuration of a hub id or repository folder, as ``main`` of ``openai/gsm8k``.
        name: what metrics and errors call it; by default the last part of the path.
        media_keys: for the kinds ``images``, ``audios`` and ``videos`` the key that holds them, where it is not the
            kind's own name: a path, bytes, a data URI, or a list of these, one for each ``<image>`` (``<audio>``,
            ``<video>``) of the record, in order; a relative path is looked up beside the data, then in the working
            directory. ``null`` for a kind leaves the column alone and makes ``<image>`` ordinary text.

    Raises:
        ValueError: a key that could have no effect, or an empty path.
    """

    path: str
    split: str = "train"
    subset: str | None = None
    name: str = ""
    media_keys: dict[str, str | None] | None = None

    def __post_init__(self) -> None:
        if not self.path.strip():
            raise ValueError("A data source needs a path: a file, a folder or a Hugging Face hub id.")
        if self._suffix in FILE_KINDS and (self.split != "train" or self.subset is not None):
            raise ValueError(f"{self.path} is a file, which has no splits or subsets; remove the key.")
        self.name = self.name or _default_name(self.path)
        if unknown := set(self.media_keys or {}) - PART_OF.keys():
            raise ValueError(f"{self.name}: media_keys has {min(unknown)!r}; kinds are {', '.join(PART_OF)}.")

    @property
    def _suffix(self) -> str:
        return Path(self.path).suffix.lower()

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Columns that are text, however much they look like numbers."""
        return ()

    @property
    def keys_of_media(self) -> dict[str, str]:
        """Media kind (``images``) to the key that holds it, without the kinds that are switched off."""
        keys = {kind: kind for kind in PART_OF} | (self.media_keys or {})
        return {kind: key for kind, key in keys.items() if key is not None}

    @property
    def folder(self) -> Path:
        """Folder that relative media paths are looked up in first."""
        files = _local_files(self.path)
        path = files[0].parent if files else Path(self.path).expanduser()
        return path if path.is_dir() else Path()

    def load(self) -> Any:
        """The raw records: a sized, indexable collection of dicts. Encoded media stay encoded.

        Raises:
            FileNotFoundError: nothing is there, or the hub does not answer.
            ValueError: what is there cannot be read, or holds no records.
        """
        files, folder = _local_files(self.path), Path(self.path).expanduser()
        if files:
            records = self._load_files(files)
        elif folder.is_dir():
            records = self._load_folder(folder)
        elif self._suffix in FILE_KINDS or not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", self.path):
            raise FileNotFoundError(f"There is no data file or folder {self.path}; check the path.")
        else:
            records = self._load_dataset(self.path)
        if not len(records):
            raise ValueError(f"{self.path} holds no records.")
        return records

    def _load_files(self, files: Sequence[Path]) -> Any:
        kinds = {file.suffix.lower() for file in files}
        if kinds <= {".json", ".jsonl"}:
            return load_json(files)
        if len(kinds) > 1 or not kinds <= set(FILE_KINDS):
            found = ", ".join(sorted(kind or "no suffix" for kind in kinds))
            raise ValueError(f"{self.path} is of kind {found}; data files are one of {', '.join(FILE_KINDS)}.")
        if kinds == {".parquet"}:
            return self._load_dataset("parquet", files)
        text = dict.fromkeys(self.text_keys, str)
        # Only an empty cell is missing: "NA", "None" and "nan" are answers like any other.
        return self._load_dataset("csv", files, converters=text, keep_default_na=False, na_values=[""])

    def _load_folder(self, folder: Path) -> Any:
        import datasets

        saved = any((folder / mark).exists() for mark in ("state.json", "dataset_dict.json"))
        if not saved:
            return self._load_dataset(str(folder))
        records = datasets.load_from_disk(str(folder))
        splits = list(records) if isinstance(records, datasets.DatasetDict) else ["train"]
        if self.split not in splits or self.subset is not None:
            what = f"subset {self.subset!r}" if self.subset is not None else f"split {self.split!r}"
            raise ValueError(f"{self.path} has no {what}; its splits are {', '.join(splits)}.")
        return _undecoded(records[self.split] if isinstance(records, datasets.DatasetDict) else records)

    def _load_dataset(self, what: str, files: Sequence[Path] = (), **options: Any) -> Any:
        import datasets

        if files:
            options["data_files"], split = list(map(str, files)), "train"
        else:
            options["name"], split = self.subset, self.split
        try:
            return _undecoded(datasets.load_dataset(what, split=split, **options))
        except datasets.exceptions.DatasetGenerationError as error:
            raise ValueError(f"{self.path} cannot be read: {error.__cause__ or error}") from error
        except ValueError as error:
            raise ValueError(f"{self.path} cannot be read: {error}") from error
        except OSError as error:
            raise FileNotFoundError(
                f"{self.path} is neither a local path nor a Hugging Face data set that can be reached: {error}"
            ) from error


@dataclass
class PromptSource(DataSource):
    """Prompts, each with what its rewards need. A dotted key reaches into nested records (``extra_info.level``).

    Args:
        input_key: the prompt: text, or a list of messages with ``role`` and ``content``.
        reference_key: the expected answer, text or number; by default ``reference``, else
            ``reward_model.ground_truth``, else ``ground_truth``, else none.
        label_key: name of the reward recipe; falls back to the same key in ``extra_info``, else none.
        label: one reward recipe for all records, instead of ``label_key``.
        format: ``gsm8k`` takes ``question``, and as reference what follows ``####`` in ``answer``, without commas.

    Raises:
        ValueError: a key that could have no effect.
    """

    input_key: str = "input"
    reference_key: str = "reference"
    label_key: str = "label"
    label: str | None = None
    format: Literal["gsm8k"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label is not None and self.label_key != "label":
            raise ValueError(f"{self.name}: label makes label_key {self.label_key!r} ineffective; give one of them.")
        if self.format is not None and (self.input_key, self.reference_key) != ("input", "reference"):
            raise ValueError(f"{self.name}: format {self.format} sets input_key and reference_key; remove them.")

    @property
    def text_keys(self) -> tuple[str, ...]:
        return (self.input_key, self.reference_key, self.label_key, "ground_truth", "question", "answer")


@dataclass
class Source(PromptSource):
    """Prompts to train on.

    Args:
        probability: share of the draws when sources are blended; all of the sources give one or none does. Without,
            the sources are one pool in which every record comes once an epoch.

    Raises:
        ValueError: a probability that is not positive, or a key that could have no effect.
    """

    probability: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probability is not None and not (self.probability > 0 and math.isfinite(self.probability)):
            raise ValueError(f"{self.name}: probability is {self.probability}; it must be a positive number.")


@dataclass
class SupervisedSource(DataSource):
    """Conversations for supervised fine-tuning; a record with ``messages_key`` is one, else prompt and response are.

    Args:
        messages_key: list of messages with ``role`` and ``content``; every assistant turn is learned.
        prompt_key: text, or a list of messages, that the response follows.
        response_key: text to learn.

    Raises:
        ValueError: a key of the path that could have no effect.
    """

    messages_key: str = "messages"
    prompt_key: str = "prompt"
    response_key: str = "response"

    @property
    def text_keys(self) -> tuple[str, ...]:
        return (self.prompt_key, self.response_key)


def sources_of(sources: Any, what: str) -> list[Any]:
    """The sources as a list, names checked.

    Raises:
        ValueError: two sources of one name.
    """
    listed = [] if sources is None else list(sources) if isinstance(sources, (list, tuple)) else [sources]
    names = [source.name for source in listed]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Two {what} sources are called {name!r}; give each its own name.")
    return listed


def _local_files(path: str) -> list[Path]:
    exact = Path(path).expanduser()
    if exact.exists():
        return [exact] if exact.is_file() else []
    if not glob.has_magic(path):
        return []
    return sorted(file for file in map(Path, glob.glob(str(exact), recursive=True)) if file.is_file())


def _default_name(path: str) -> str:
    last = Path(path)
    stem = last.stem if last.suffix.lower() in FILE_KINDS else last.name
    return re.sub(r"[*?\[\]]+", "", stem).strip("-_. ") or "data"


def _undecoded(records: Any) -> Any:
    """Media columns as bytes or paths: a prompt holds references, and decoding is the processor's."""
    for column, feature in records.features.items():
        if (encoded := _encoded(feature)) is not feature:
            records = records.cast_column(column, encoded)
    return records


def _encoded(feature: Any) -> Any:
    import datasets

    if getattr(feature, "decode", False) and isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
        return type(feature)(decode=False)
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        inner = _encoded(feature.feature)
        return feature if inner is feature.feature else type(feature)(inner)
    if isinstance(feature, dict):
        inner = {key: _encoded(value) for key, value in feature.items()}
        return feature if all(inner[key] is feature[key] for key in feature) else inner
    return feature
