# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A written data set -> the Hub, after a look at what would be published."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import readable_size, temporary_folder
from ...printable import printable
from ...private_text import check_file, check_inside
from ..datasets_cache import named_cache
from ..parquet_sizes import check_parquet
from ..readable_rows import check_row
from ..schema import row_features

PUBLISHED = ("README.md", "LICENSE", "build_report.json", "samples.png")  # besides the shards
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-(?P<index>\d{5})-of-(?P<total>\d{5})\.parquet")


@dataclass
class Publication:
    """What is published, or would be.

    Args:
        files (`dict[str, int]`): Path in the data set -> bytes.
        rows (`dict[str, int]`): Split -> rows.
        left_behind (`list[str]`): Files of the folder that are no part of the data set and stay where they are.
        url (`str`, *optional*): Of the data set on the Hub; `None` for a dry run.
    """

    files: dict[str, int]
    rows: dict[str, int]
    left_behind: list[str]
    url: str | None = None

    def to_text(self) -> str:
        """The tree with sizes, and the rows."""
        width = max(map(len, self.files))
        lines = [f"  {path:{width}}  {readable_size(number)}" for path, number in self.files.items()]
        lines.append(f"  {'in all':{width}}  {readable_size(sum(self.files.values()))}")
        lines.append("rows: " + ", ".join(f"{split} {number:,}" for split, number in self.rows.items()))
        if self.left_behind:
            lines.append(f"not part of the data set: {', '.join(self.left_behind)}")
        return "\n".join(lines)


def push_dataset(
    folder_or_dataset: Any,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    dry_run: bool = False,
) -> Publication:
    """Publish a data set on the Hub, after `check_written_dataset`.

    Only what belongs to the data set is uploaded. Shards and a licence that the repository holds from before and that
    are no part of it any more are removed: `load_dataset` would read such shards too.

    Args:
        folder_or_dataset: A folder of `write_dataset`, or what `write_dataset` takes.
        repo_id (`str`): `owner/name`, or `name` for one's own.
        private (`bool`, *optional*, defaults to `False`): For oneself and one's organisation only.
        token (`str`, *optional*): The one of `hf auth login` or `HF_TOKEN` by default.
        dry_run (`bool`, *optional*, defaults to `False`): Only check and tell, without a network.

    Returns:
        [`Publication`]

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: The folder holds no complete data set, the name is none, or the repository is public and `private`
            was asked for.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(repo_id)
    if not isinstance(folder_or_dataset, (str, os.PathLike)):
        from .write import write_dataset

        with temporary_folder("push") as parent:
            written = write_dataset(folder_or_dataset, Path(parent) / repo_id.split("/")[-1])
            return push_dataset(written.folder, repo_id, private, token, dry_run)
    publication = check_written_dataset(folder_or_dataset)
    if dry_run:
        return publication
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
    if private and not api.repo_info(repo_id, repo_type="dataset").private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or name another.")
    api.upload_folder(
        repo_id=repo_id,
        repo_type="dataset",
        folder_path=str(folder_or_dataset),
        allow_patterns=list(publication.files),
        delete_patterns=["data/*.parquet", *PUBLISHED],  # of the repository's; what is uploaded stays
        commit_message=f"{sum(publication.rows.values())} rows",
    )
    publication.url = f"{api.endpoint}/datasets/{repo_id}"
    return publication


def check_written_dataset(folder: str | os.PathLike) -> Publication:
    """Look at a data set as a stranger would load it.

    Every shard is there, complete and in the row schema, and its first image and masks can be decoded; the card
    promises the rows and columns that the shards have; `load_dataset` gives each split. No file is a link out of the
    folder, and no text, of the rows either, holds a key or a folder of this machine.

    Raises:
        FileNotFoundError: There is no such folder, or no shard or card in it.
        ValueError: Anything else is wrong, with the file.
    """
    folder = Path(folder)
    shards = _shards_by_split(folder)
    for path in (*(folder / name for name in PUBLISHED), *(path for paths in shards.values() for path in paths)):
        check_inside(path, folder)
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"{str(folder)!r} has no README.md; write it with `segcompass data build`.")
    rows = {split: sum(map(_checked_rows, paths)) for split, paths in shards.items()}
    _check_card(folder, rows)
    _check_loading(folder, shards)
    paths = [folder / name for name in PUBLISHED if (folder / name).is_file()]
    paths += [path for split in shards for path in shards[split]]
    for path in paths:
        check_file(path, path.relative_to(folder).as_posix())
    files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
    found = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    return Publication(files, rows, [path for path in found if path not in files])


def _shards_by_split(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}.")
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    totals: dict[str, set[int]] = defaultdict(set)
    for path in sorted((folder / "data").glob("*.parquet")):
        match = SHARD.fullmatch(path.name)
        if match is None:
            raise ValueError(
                f"data/{path.name} is no shard; expected a name such as data/train-00000-of-00003.parquet."
            )
        found[match["split"]][int(match["index"])] = path
        totals[match["split"]].add(int(match["total"]))
    if not found:
        raise FileNotFoundError(
            f"{str(folder)!r} holds no data/*.parquet; write a data set with `segcompass data build`."
        )
    for split, paths in found.items():
        total = max(totals[split])
        if len(totals[split]) > 1:
            raise ValueError(f"the shards of split {split!r} are of several builds, of {sorted(totals[split])} files.")
        missing = sorted(set(range(total)) - set(paths))
        if missing:
            raise ValueError(f"shards {missing} of the {total} of split {split!r} are missing.")
    return {split: [paths[index] for index in sorted(paths)] for split, paths in found.items()}


def _checked_rows(path: Path) -> int:
    """Rows of a shard, whose columns are right and whose first row can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features

    name = f"data/{path.name}"
    check_parquet(path, name, row_by_row=True)
    try:
        with pq.ParquetFile(path, buffer_size=1 << 20) as shard:  # whole row groups are many images
            if Features.from_arrow_schema(shard.schema_arrow) != row_features():
                raise ValueError(f"{name} is not in the row schema; it has {', '.join(shard.schema_arrow.names)}.")
            first = next(shard.iter_batches(batch_size=1), None)
            if first is None:
                raise ValueError(f"{name} has no row.")
            row, count = first.to_pylist()[0], shard.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is no complete Parquet file ({error}); is it cut short?") from error
    except (KeyError, TypeError, AttributeError) as error:  # of a header that names no columns
        raise ValueError(f"{name} is damaged ({type(error).__name__}: {error}); build it again.") from error
    try:
        if not row["image"] or not row["image"]["bytes"]:
            raise ValueError("its image is not in the file")
        check_row(row)
    except Exception as error:  # damaged files raise about anything, from TypeError to struct.error
        raise ValueError(f"{name}: its first row ({printable(row['sample_id'])}) cannot be read: {error}") from error
    return count


def _check_card(folder: Path, rows: dict[str, int]) -> None:
    from huggingface_hub import DatasetCard

    try:
        data = DatasetCard.load(folder / "README.md").data.to_dict()
        stated = {split["name"]: split["num_examples"] for split in data["dataset_info"]["splits"]}
    except Exception as error:  # whatever a header that is not ours makes the readers raise
        detail = f"{type(error).__name__}: {error}"
        raise ValueError(f"README.md does not state the splits ({detail}); build the data set again.") from error
    if stated != rows:
        raise ValueError(f"README.md promises {stated} rows, but the shards hold {rows}; build the data set again.")


@named_cache()
def _check_loading(folder: Path, shards: dict[str, list[Path]]) -> None:
    import datasets

    try:
        builder = datasets.load_dataset_builder(str(folder))
        found = {str(split): sorted(map(Path, files)) for split, files in builder.config.data_files.items()}
        features = {split: builder.as_streaming_dataset(split=split).features for split in found}
    except Exception as error:  # whatever the readers raise
        raise ValueError(f"load_dataset cannot read the folder: {type(error).__name__}: {error}") from error
    expected = {split: [path.resolve() for path in paths] for split, paths in shards.items()}
    resolved = {split: [path.resolve() for path in paths] for split, paths in found.items()}
    wrong = sorted(split for split in expected.keys() | found if resolved.get(split) != expected.get(split))
    wrong += [split for split in found if features[split] != row_features()]
    if wrong:
        raise ValueError(
            f"load_dataset reads other files or columns than the shards have, in the splits {wrong}. Is the header of "
            "README.md changed? Build the data set again."
        )
