# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A concept dictionary on disk: numbers in `concepts.safetensors`, a readable table in `concepts.parquet`.

The numbers' header names the SAE they are of and the table they belong to, so that neither a dictionary of another SAE
nor a half-written one is taken for good.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save
from torch import nn

from ...concept_names_segcompass import NUMBERS_FILE, NamedConcept, is_same_sketch, names_header, sae_sketch
from ...data.parquet_sizes import check_parquet
from ...files import write_whole
from ...offloading_segcompass import weights_at_hand
from .entries import ConceptEntry

TABLE_FILE = "concepts.parquet"
FORMAT = "segcompass-concepts-1"
_ARRAYS = ("sae_sketch", "pictures", "picture_ends", "scores.derived_f1_words", "scores.derived_f1_patches")
_INFO = {"d_sae": int, "rows": int, "rows_derive": int, "rows_score": int, "sae_sha256": str}
_COLUMNS = [field.name for field in fields(ConceptEntry)]
_NEWER_COLUMNS = ("names", "effect", "interpretation")  # that files of the first releases lack


def sae_hash(sae: nn.Module) -> str:
    """SHA-256 of an SAE's weights as float32, the same for every dtype that holds them exactly."""
    digest = hashlib.sha256()
    with weights_at_hand(sae):
        for name, weight in sorted(sae.state_dict().items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_sae(info: dict[str, Any], sketch: np.ndarray, sae: nn.Module) -> None:
    """Raise unless a dictionary is of this SAE, up to the rounding of its weights.

    Raises:
        ValueError: It is of another SAE.
    """
    if info["d_sae"] != sae.config.d_sae:
        raise ValueError(
            f"the concept dictionary describes {info['d_sae']} features, the model's SAE has {sae.config.d_sae}; "
            "build one for this model: ConceptDictionary.build(model, processor, rows)."
        )
    if not is_same_sketch(sae_sketch(sae), sketch) and sae_hash(sae) != info["sae_sha256"]:
        raise ValueError(
            f"the concept dictionary was made with another SAE (SHA-256 {info['sae_sha256'][:12]}, the model's is "
            f"{sae_hash(sae)[:12]}), whose features mean other things; build one for this model: "
            "ConceptDictionary.build(model, processor, rows)."
        )


def write_files(
    folder: str | os.PathLike,
    arrays: dict[str, np.ndarray],
    columns: dict[str, list],
    info: dict[str, Any],
    names: Iterable[NamedConcept],
) -> None:
    """Write both files, each in one step; a reader never sees half a file, nor files that do not belong together."""
    _, parquet = _pyarrow()
    folder = Path(folder)
    file = io.BytesIO()
    parquet.write_table(_table(columns), file, compression="zstd")
    table = file.getvalue()
    header = {"format": FORMAT, "table_sha256": hashlib.sha256(table).hexdigest(), "info": json.dumps(info)}
    header["names"] = names_header(names)  # for readers without Parquet
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    numbers = save(contiguous, metadata=header)
    for name, data in ((TABLE_FILE, table), (NUMBERS_FILE, numbers)):
        write_whole(folder / name, data)


def read_files(folder: str | os.PathLike) -> tuple[dict[str, np.ndarray], Any, dict[str, Any]]:
    """Read both files: arrays, the table (`pyarrow.Table`), and what the header says of their making.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file is damaged, of another version, or of another dictionary than the other one.
    """
    folder = Path(folder)
    missing = [name for name in (NUMBERS_FILE, TABLE_FILE) if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} holds no complete concept dictionary: {' and '.join(missing)} missing; write one with "
            "ConceptDictionary.build(...).save(folder)."
        )
    arrays, header = _read_numbers(folder / NUMBERS_FILE)
    table = (folder / TABLE_FILE).read_bytes()
    if hashlib.sha256(table).hexdigest() != header.get("table_sha256"):
        raise ValueError(
            f"{folder / TABLE_FILE} is not the table that {NUMBERS_FILE} was written with (writing was interrupted, "
            "or one of the two was replaced); write the dictionary again."
        )
    _, parquet = _pyarrow()
    check_parquet(io.BytesIO(table), TABLE_FILE)
    table, info = parquet.read_table(io.BytesIO(table)), _read_info(header.get("info"))
    problem = _what_is_wrong(arrays, table, info)
    if problem:
        raise ValueError(f"the concept dictionary in {folder} {problem}; write the dictionary again.")
    return arrays, table, info


def _read_info(text: str | None) -> dict[str, Any]:
    try:
        info = json.loads(text or "{}")
    except (ValueError, RecursionError):
        info = None
    return info if isinstance(info, dict) else {}


def _what_is_wrong(arrays: dict[str, np.ndarray], table: Any, info: dict[str, Any]) -> str | None:
    """What a reader would miss or trip over, in words."""
    lacking = [f"info.{name}" for name, kind in _INFO.items() if not isinstance(info.get(name), kind)]
    lacking += [name for name in _ARRAYS if name not in arrays]
    lacking += [f"column {name}" for name in _COLUMNS if name not in (*table.column_names, *_NEWER_COLUMNS)]
    if lacking:
        return f"lacks {', '.join(lacking)}"
    unknown = sorted(set(table.column_names) - set(_COLUMNS))
    if unknown:
        return f"has columns of another version: {', '.join(unknown)}"
    d_sae, ends = info["d_sae"], arrays["picture_ends"]
    shapes = {"the table": (table.num_rows,)}
    shapes |= {name: array.shape for name, array in arrays.items() if name.startswith("scores.")}
    wrong = [f"{name} is of shape {shape}" for name, shape in shapes.items() if shape != (d_sae,)]
    if wrong:
        return f"describes {d_sae} features, but {', '.join(wrong)}"
    if ends.ndim != 1 or ends.dtype.kind not in "iu":
        return f"has picture_ends of {ends.dtype} and shape {ends.shape}, expected whole numbers in a row"
    if (np.diff(ends, prepend=0) < 0).any() or ends.max(initial=0) > len(arrays["pictures"]):
        return "has pictures whose ends are not in order or beyond the last"
    return None


def _read_numbers(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    from safetensors import safe_open

    try:
        with safe_open(path, "np") as file:
            header = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged ({error}); write the dictionary again.") from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is of format {header.get('format')!r}, this version reads {FORMAT!r}; build the dictionary again."
        )
    return arrays, header


def _pyarrow():
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(
            "concept dictionaries are stored as Parquet, which needs pyarrow: pip install 'segcompass_hf[explain]'."
        ) from error
    return pyarrow, pyarrow.parquet


def _table(columns: dict[str, list]):
    """Columns of Python values as a table; types are given, since an empty list has none."""
    pa, _ = _pyarrow()
    real, text, whole = pa.float32(), pa.string(), pa.int32()
    word = pa.struct([("word", text), ("before", text), ("after", text), ("sample_id", text), ("activation", real)])
    patch = [("sample_id", text), ("box", pa.list_(whole)), ("size", pa.list_(whole)), ("activation", real)]
    other = [("feature", whole), ("label", text), ("jaccard", real), ("information", real)]
    types = {
        "feature": whole,
        "label": text,
        "label_place": text,
        "words": pa.list_(pa.struct([("word", text), ("share", real)])),
        "top_words": pa.list_(word),
        "top_patches": pa.list_(pa.struct([*patch, ("picture", whole)])),
        "cofiring": pa.list_(pa.struct(other)),
    }
    name = [("text", text), ("family", text), ("scope", text), ("f1", real), ("purity", real), ("chance", real)]
    types["names"] = pa.list_(pa.struct([*name, ("threshold_words", real), ("threshold_patches", real)]))
    effect = [("masks", whole), ("raises", real), ("share", real), ("slots", pa.list_(real)), ("tested", whole)]
    types["effect"] = pa.struct([*effect, ("iou_without", real), ("inside", real), ("outside", real)])
    types["interpretation"] = text
    schema = pa.schema([(name, types.get(name, real)) for name in columns])
    return pa.Table.from_pydict(columns, schema=schema)


__all__ = ["NUMBERS_FILE", "TABLE_FILE", "check_sae", "read_files", "sae_hash", "sae_sketch", "write_files"]
