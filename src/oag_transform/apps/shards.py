"""Images in parquet files and WebDataset shards. Rows become jobs, and results become rows."""

import contextlib
import hashlib
import io
import os
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from ray.data.datasource import FileBasedDatasource
from ray.data.datasource.partitioning import PartitionStyle, PathPartitionParser

from .. import streams
from ..files import one_line, reason
from . import saving, worker
from .sources import IMAGE_SUFFIXES, SHARDS, TAR, Job, SourceFiles, target_in

NAME_COLUMNS = ("name", "path", "file_name", "filename", "__key__")
READ_ERROR = "read_error"  # column: the reason why an image can't be read from its shard
BLOCK = 64  # samples of a shard that are read together
INTEGERS, TEXTS = ("cls", "cls2", "index"), ("txt", "text", "json")  # parts of WebDataset samples; all others are bytes

Hashes = npt.NDArray[np.int64]
NO_NAMES: Hashes = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Shards:
    """Files that contain many images.

    Attributes:
        files: all parquet, or all tar (WebDataset).
        image: column of image files, or of structures with image files in the field ``bytes`` (Hugging Face).
        name: column of names; a dot selects a field of a structure.
        rows: number of images in parquet files, from their footers; None for WebDataset.
    """

    files: tuple[Path, ...]
    image: str
    name: str
    rows: int | None = None


def among(found: SourceFiles, image: str | None, name: str | None) -> Shards | None:
    """The shards among the input files, or None. An unreadable parquet file is a problem.

    Raises:
        ValueError: shards together with other files, shards of both kinds, or a missing column.
    """
    paths = [file.path for file in found.files if not any(part.startswith("_") for part in file.relative.parts)]
    kinds = {path.suffix.lower() for path in paths}
    if kinds.isdisjoint(SHARDS):
        return None
    if len(kinds) > 1:
        raise ValueError(f"expected image files, or parquet files, or WebDataset shards (.tar), got {', '.join(sorted(kinds))}")
    paths = [path.absolute() for path in paths]
    if kinds == {TAR}:
        if image is not None or name is not None:
            raise ValueError("--image-column and --name-column are for parquet: a WebDataset sample has its key and its image")
        return Shards(tuple(paths), "image", "name")
    image = image or "image"
    kept, rows = [], 0
    for path in paths:
        try:
            footer = pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            found.problems.append((str(path), f"it is not a parquet file that can be read, {reason(error)}"))
            continue
        schema = footer.schema.to_arrow_schema()
        if image not in schema.names:
            raise ValueError(f"{path} has no column {image!r}: give --image-column, one of {', '.join(schema.names)}")
        name = name or _name_column(path, schema, image)
        if name.partition(".")[0] not in schema.names and name not in schema.names:
            raise ValueError(f"{path} has no column {name!r}: give --name-column, one of {', '.join(schema.names)}")
        kept.append(path)
        rows += footer.num_rows
    return Shards(tuple(kept), image, name or "name", rows)


def _name_column(file: Path, schema: pa.Schema, image: str) -> str:
    found = next((column for column in NAME_COLUMNS if column in schema.names), None)
    if found is not None:
        return found
    kind = schema.field(image).type
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        return f"{image}.path"
    raise ValueError(
        f"{file} has no column of names ({', '.join(NAME_COLUMNS)}): give --name-column, one of {', '.join(schema.names)}; "
        "random streams follow the names"
    )


def parquet_rows(paths: pa.Table, shards: Shards) -> Iterator[pa.Table]:
    """The rows of the parquet files in column ``path``, with a column for each part of the path such as ``label=3``, as in Ray.

    Ray's own reader would fail at the first damaged page. Here a row with a :data:`READ_ERROR` stands for the rest of its row
    group.
    """
    for path in map(os.fsdecode, paths["path"].to_pylist()):
        inside = PathPartitionParser.of(PartitionStyle.HIVE)(path)
        for table in _row_groups(path, shards):
            for key, value in {READ_ERROR: None, **inside}.items():
                if key not in table.column_names:
                    table = table.append_column(key, pa.array([value] * table.num_rows, pa.string()))
            yield table


def _row_groups(path: str, shards: Shards) -> Iterator[pa.Table]:
    try:
        file = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:  # its footer could be read before
        yield _unread(path, pa.schema({shards.image: pa.null(), shards.name: pa.string()}), shards, reason(error))
        return
    with file:
        for group in range(file.num_row_groups):
            left = file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(BLOCK, row_groups=[group]):
                    yield pa.Table.from_batches([batch])
                    left -= batch.num_rows
            except Exception as error:  # damaged pages make Arrow raise almost any exception
                problem = f"{left} rows of row group {group} can't be read: {reason(error)}"
                yield _unread(path, file.schema_arrow, shards, problem)


def _unread(path: str, schema: pa.Schema, shards: Shards, problem: str) -> pa.Table:
    """A row of the file's columns, in which the file's path is the name."""
    columns, named = {column.name: pa.nulls(1, column.type) for column in schema}, one_line(path)
    name, _, inner = (shards.name, "", "") if shards.name in columns else shards.name.partition(".")
    with contextlib.suppress(pa.ArrowException):  # if names are numbers
        columns[name] = pa.array([{inner: named} if inner else named], schema.field(name).type)
    return pa.table(columns | {READ_ERROR: pa.array([f"{named}: {problem}"], pa.string())})


def names_in(folder: Path, shards: Shards | None) -> Hashes:
    """Hashes of the names in the parquet files of an earlier run, in ascending order."""
    column = "name" if shards is None else shards.name
    found: list[int] = []
    for path in sorted(folder.glob("part-*.parquet")):
        try:
            names = _names(pq.read_table(path, columns=[column]), column)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"--out has {path}, which has no readable names in column {column!r}: {reason(error)}") from error
        found += (streams.index_of(name) for name in names if name is not None)
    return np.sort(np.array(found, dtype=np.int64))


def jobs_in(part: pa.Table, shards: Shards, out: Path, suffix: str | None) -> list[Job]:
    """The job of each row of a part of the shards; the error of a row is its problem."""
    errors = part[READ_ERROR].to_pylist() if READ_ERROR in part.column_names else [None] * part.num_rows
    columns = zip(_names(part, shards.name), part[shards.image].to_pylist(), errors, strict=True)
    return [job_of(name, image, out, suffix, row, error) for row, (name, image, error) in enumerate(columns)]


def job_of(name: str | None, image: Any, out: Path, suffix: str | None, row: int, error: str | None = None) -> Job:
    """The job of a row, whose result is a file below ``out``.

    Args:
        name: path within the data set.
        image: image file, or a structure with it in the field ``bytes``.
        out: folder of results.
        suffix: of the result; None: that of the name.
        row: number of the row.
        error: the reason why the image can't be read, if it can't.
    """
    content: Any = image.get("bytes") if isinstance(image, Mapping) else image
    error = error or _problem(name, content)
    if error is not None or name is None:
        return Job(Path(name or f"row {row} of a part"), out, name or "", b"", error, row)
    return Job(Path(name), target_in(out, Path(name), suffix), name, bytes(content), None, row)


def _problem(name: str | None, content: Any) -> str | None:
    if not name:
        return "it has no name"
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts or "\0" in name or Path(name).drive:
        return f"{name!r} is not a path within a folder"
    if content is None:
        return "it has no image"
    return None if isinstance(content, (bytes, memoryview)) else f"its image is not a file, but {type(content).__name__}"


def _names(table: pa.Table, column: str) -> list[str | None]:
    """A column as text; a dot selects a field of a structure if no column has that name."""
    if column in table.column_names:
        values = table[column].to_pylist()
    else:
        first, _, inner = column.partition(".")
        values = [(value or {}).get(inner) for value in table[first].to_pylist()]
    return [text(value) for value in values]


def text(value: Any) -> str | None:
    """A name or message in a column: UTF-8 if it is bytes, None if it is missing, which is NaN in pandas."""
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return None if value is None or value != value else str(value)


def write_part(
    part: pa.Table, shards: Shards | None, outcomes: Sequence[worker.PurifyOutcome], plan: worker.PurifyPlan
) -> None:
    """Write purified images to one parquet file, with all other columns of their rows; an existing file is replaced."""
    outcomes = sorted(outcomes, key=lambda outcome: outcome.job.row)
    names = [outcome.job.name.encode(errors="backslashreplace") for outcome in outcomes]
    if shards is None:
        table = pa.table({"name": [name.decode() for name in names], "image": [outcome.content for outcome in outcomes]})
    else:
        table, place = part.take([outcome.job.row for outcome in outcomes]), part.schema.get_field_index(shards.image)
        images = [with_content(old, outcome.content) for old, outcome in zip(table[place].to_pylist(), outcomes, strict=True)]
        table = table.set_column(place, part.schema.field(place), pa.array(images, type=part.schema.field(place).type))
        table = table.drop_columns([READ_ERROR] if READ_ERROR in table.column_names else [])
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    digest = hashlib.blake2b(b"\0".join(names), digest_size=8).hexdigest()
    saving.write(plan.out / f"part-{digest}.parquet", buffer.getvalue(), plan.token)


def with_content(image: Any, content: bytes | None) -> Any:
    """An entry of the column of images, with its file replaced."""
    return {**image, "bytes": content} if isinstance(image, Mapping) else content


class WebDatasetSource(FileBasedDatasource):
    """WebDataset shards; :func:`ray.data.read_webdataset` would fail at the first incomplete sample or shard."""

    def _read_stream(self, stream: Any, path: str) -> Iterator[pa.Table]:
        rows: list[dict[str, Any]] = []
        try:
            for sample in _samples(stream):
                rows.append(_row(*sample))
                if len(rows) == BLOCK:
                    yield _table(rows)
                    rows = []
        except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
            problem = f"it can't be read to its end, and the rest is missing: {reason(error)}"
            rows.append({"name": PurePosixPath(path).name, "image": None, READ_ERROR: problem})
        if rows:
            yield _table(rows)


def _samples(stream: Any) -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Key and parts of each sample: consecutive files whose paths are equal up to the first dot of their names."""
    key, parts = None, list[tuple[str, bytes]]()
    with tarfile.open(fileobj=stream, mode="r|*") as shard:
        for member in shard:
            found = re.match(r"((?:.*/)?[^./]+)\.([^/]+)$", member.name, re.DOTALL)
            file = shard.extractfile(member) if member.isreg() and found else None
            if found is None or file is None:
                continue
            if found[1] != key and key is not None:
                yield key, parts
                parts = []
            key = found[1]
            parts.append((found[2], file.read()))
    if key is not None:
        yield key, parts


def _row(key: str, parts: Iterable[tuple[str, bytes]]) -> dict[str, Any]:
    """A sample as a row of its parts, each by its suffix in lower case, and an underscore where that is a column of its own."""
    row: dict[str, Any] = {"name": key, "image": None, READ_ERROR: None}
    own, problems = frozenset(row), []
    for suffix, content in parts:
        part = suffix.lower() + "_" * (suffix.lower() in own)
        if part in row:
            problems.append(f"it has more than one part {part!r}")
        elif f".{part}" in IMAGE_SUFFIXES and row["image"] is None:
            row |= {"name": f"{key}.{suffix}", "image": content}
        else:
            try:
                row[part] = _int64(content) if part in INTEGERS else content.decode() if part in TEXTS else content
            except ValueError:
                row[part] = None
                wanted = "an integer of 64 bits" if part in INTEGERS else "UTF-8"
                problems.append(f"its {part} is not {wanted}: {content[:20]!r}")
    if row["image"] is None:
        problems.append(f"it has no image, only {', '.join(suffix for suffix, _ in parts)}")
    return row | {READ_ERROR: "; ".join(problems) or None}


def _int64(content: bytes) -> int:
    value = int(content)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"expected 64 bits, got {value}")
    return value


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    columns = dict.fromkeys(column for row in rows for column in row)
    kinds = dict.fromkeys(INTEGERS, pa.int64()) | dict.fromkeys(("name", READ_ERROR, *TEXTS), pa.string())
    return pa.table({key: pa.array([row.get(key) for row in rows], kinds.get(key, pa.binary())) for key in columns})
