"""Parquet and Arrow files to rows, as if they had been JSON.

Arrow knows one set of keys for every object of a column and fills in null where a row has none: a call of
`weather(town)` comes back with the arguments of every other tool. So null keys of objects are left out, at
every depth; a column of the table itself is always there. JSON stored as such is parsed, maps are objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qlora_trainer.data.lines import COMPRESSIONS, Found
from qlora_trainer.errors import DataError
from qlora_trainer.system.untrusted import parse_json

ROWS = 512  # turned into Python's objects at a time

Change = Callable[[Any], Any]


def read_parquet(path: Path) -> Iterator[Found]:
    _refuse_compressed(path)
    with pq.ParquetFile(path) as file:
        yield from _rows(file.schema_arrow, file.iter_batches(batch_size=ROWS))


def read_arrow(path: Path) -> Iterator[Found]:
    """Both of Arrow's forms: the stream that `save_to_disk` writes, and the file (Feather)."""
    _refuse_compressed(path)
    with pa.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            with pa.ipc.open_file(source) as file:
                batches = (file.get_batch(at) for at in range(file.num_record_batches))
                yield from _rows(file.schema, batches)
        else:
            source.seek(0)
            with pa.ipc.open_stream(source) as stream:
                yield from _rows(stream.schema, stream)


def _refuse_compressed(path: Path) -> None:
    if path.suffix.lower() in COMPRESSIONS:
        raise DataError(f"{path}: Parquet and Arrow are compressed inside; unpack the file")


def _rows(schema: pa.Schema, batches: Iterator[pa.RecordBatch]) -> Iterator[Found]:
    as_json = row_change(schema)
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS):
            for row in batch.slice(start, ROWS).to_pylist():
                number += 1
                yield Found(number, as_json(row))


def row_change(schema: pa.Schema | None, parsed: bool = False) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What makes of a row what would stand in JSON. `parsed`: values of JSON columns are parsed already.

    Without a schema, every null key of an object counts as Arrow's.
    """
    if schema is None:
        return lambda row: {name: _without_nulls(value) for name, value in row.items()}
    found = {field.name: _change(field.type, parsed) for field in schema}
    changes = {name: _or_null(change) for name, change in found.items() if change is not None}
    return lambda row: row | {name: change(row[name]) for name, change in changes.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if not _missing(item)}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _change(type: pa.DataType, parsed: bool) -> Change | None:
    if isinstance(type, pa.JsonType):
        return None if parsed else _parsed
    if pa.types.is_struct(type):
        fields = {field.name: _change(field.type, parsed) or _same for field in type}
        return lambda value: {name: fields[name](item) for name, item in value.items() if not _missing(item)}
    if pa.types.is_map(type):
        item_change = _or_null(_change(type.item_type, parsed) or _same)
        return lambda value: {name: item_change(item) for name, item in value}
    if pa.types.is_list(type) or pa.types.is_large_list(type) or pa.types.is_fixed_size_list(type):
        inner = _change(type.value_type, parsed)
        if inner is None:
            return None
        item_change = _or_null(inner)
        return lambda value: [item_change(item) for item in value]
    return None


def _parsed(value: str) -> Any:
    try:
        return parse_json(value)
    except ValueError:
        return value  # not what its type says: whoever wants an object will tell


def _same(value: Any) -> Any:
    return value


def _or_null(change: Change) -> Change:
    return lambda value: None if value is None else change(value)


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))
