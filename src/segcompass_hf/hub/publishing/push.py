# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint, its processor, code, card and concept dictionary -> a model repository on the Hub, in one commit."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ...files import file_digest, readable_size, temporary_folder
from .stage import Stage, is_owned, stage_checkpoint

logger = logging.get_logger(__name__)


@dataclass
class ModelPublication:
    """What is published, or would be.

    Args:
        files (`dict[str, int]`): Path in the repository -> bytes.
        checks (`list[str]`): What was checked, a line each.
        left_behind (`list[str]`): Files of the folder that are no part of it and stay where they are.
        url (`str`, *optional*): Of the repository; `None` for a dry run.
        commit (`str`, *optional*): Of the published state; what `revision=` takes to pin it.
        collection (`str`, *optional*): URL of the collection that it was put into.
    """

    files: dict[str, int]
    checks: list[str] = field(default_factory=list)
    left_behind: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None
    collection: str | None = None

    def to_text(self) -> str:
        """The tree with sizes, and what was checked."""
        width = max(map(len, self.files))
        lines = [f"  {path:{width}}  {readable_size(number)}" for path, number in sorted(self.files.items())]
        lines.append(f"  {'in all':{width}}  {readable_size(sum(self.files.values()))}")
        lines += [f"checked: {line}" for line in self.checks]
        if self.left_behind:
            lines.append(f"not part of it: {', '.join(self.left_behind)}")
        return "\n".join(lines)


def push_to_hub(
    model_or_folder: Any,
    repo_id: str,
    processor: Any | None = None,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    base_model: str | None = None,
    evaluations: Sequence[dict[str, Any]] = (),
    collection: str | None = None,
    commit_message: str | None = None,
    device: Any = None,
    **card: Any,
) -> ModelPublication:
    """Publish a model or adapter, after a look at what would be published.

    A complete folder is staged (weights, processor, the code that loads them without this package, card, concept
    dictionary) and checked by [`check_stage`]. It becomes one commit: until that is made nobody sees any of it, so
    that no reader meets half a checkpoint. Files that an earlier push left and this one does not have are removed by
    the same commit. A push that was interrupted is repeated by the same call; large files that arrived are not sent
    again. In the end every file's hash in the repository is compared with the file here.

    Args:
        model_or_folder (`PreTrainedModel`, `PeftModel`, `str` or `os.PathLike`): A model, or a folder of a saved
            model or adapter with its processor.
        repo_id (`str`): `owner/name`, or `name` for one's own.
        processor ([`SegCompassProcessor`], *optional*): Needed with a model, not used with a folder.
        private (`bool`, *optional*, defaults to `False`): For oneself and one's organisation only.
        revision (`str`, *optional*): Branch to publish on, made where missing; `main` by default.
        token (`str`, *optional*): The one of `hf auth login` or `HF_TOKEN` by default.
        dry_run (`bool`, *optional*, defaults to `False`): Only check and tell, without a network.
        base_model (`str`, *optional*): Hub id that the card names as base; what an adapter is loaded onto.
        evaluations (`Sequence[dict]`, *optional*): Summaries of the evaluation runner, for the card.
        collection (`str`, *optional*): Title of a collection of the owner's, made where missing, or the slug of one.
        commit_message (`str`, *optional*): For the commit.
        device (`torch.device` or `str`, *optional*): Where the check runs.
        card: Further arguments of [`write_model_card`]. Given any, or evaluations, or where the folder has no card,
            a card is written; else the folder's own is published.

    Returns:
        [`ModelPublication`]

    Raises:
        FileNotFoundError: There is no such folder, or a part of it is missing.
        ValueError: A check fails, the name is none, or the repository is public and `private` was asked for.
        huggingface_hub.errors.HfHubHTTPError: The Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    from .checks import check_stage

    validate_repo_id(repo_id)
    if "/" not in repo_id and not dry_run:  # the card names the whole
        repo_id = f"{HfApi(token=token).whoami()['name']}/{repo_id}"
    with temporary_folder("push") as work:
        source = _saved(model_or_folder, processor, Path(work) / "saved")
        stage = stage_checkpoint(source, Path(work) / repo_id.split("/")[-1], base_model)
        if evaluations or card or base_model or not (stage.folder / "README.md").is_file():
            from .card import write_model_card

            write_model_card(stage.folder, repo_id=repo_id, base_model=base_model, evaluations=evaluations, **card)
        _name_repository(stage.folder / "README.md", repo_id)
        checks = check_stage(stage, evaluations, device)
        files = {name: path.stat().st_size for name, path in stage.files().items() if "__pycache__" not in name}
        publication = ModelPublication(files, checks, stage.left_behind)
        if not dry_run:
            message = commit_message or f"{stage.kind.capitalize()}, processor, code and card"
            _publish(stage, publication, repo_id, private, revision, token, message)
    if collection is not None and not dry_run:
        publication.collection = _collect(publication, collection, private, token)
    return publication


def _saved(model_or_folder: Any, processor: Any | None, folder: Path) -> Path:
    """The folder that was given, or one with the model and processor that were."""
    if isinstance(model_or_folder, (str, os.PathLike)):
        return Path(model_or_folder)
    if processor is None:
        raise ValueError("a model is published with its processor; pass push_to_hub(model, repo_id, processor).")
    model_or_folder.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def _name_repository(card: Path, repo_id: str) -> None:
    """Fill in the place that a card left open."""
    from .card import UNKNOWN_ID

    text = card.read_text(encoding="utf-8")
    if UNKNOWN_ID in text:
        card.write_text(text.replace(UNKNOWN_ID, repo_id), encoding="utf-8")


def _publish(
    stage: Stage,
    publication: ModelPublication,
    repo_id: str,
    private: bool,
    revision: str | None,
    token: str | None,
    message: str,
) -> None:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

    api = HfApi(token=token)
    ModelCard.load(stage.folder / "README.md").validate()  # asks the Hub, before anything is made there
    api.create_repo(repo_id, private=private, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings, or name another.")
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    paths = {name: path for name, path in stage.files().items() if name in publication.files}
    before = {name: _state_of(path) for name, path in paths.items()}
    stale = [name for name in api.list_repo_files(repo_id, revision=revision) if is_owned(name) and name not in paths]
    # One commit, not `upload_folder`: that one may make several, and readers would meet the first without the last.
    additions = [CommitOperationAdd(name, str(path)) for name, path in paths.items()]
    api.preupload_lfs_files(repo_id, additions, revision=revision, free_memory=False)
    changed = [name for name, path in paths.items() if _state_of(path) != before[name]]
    if changed:
        raise ValueError(f"{', '.join(changed)} changed while being uploaded; is training going on? Push again.")
    operations = [*additions, *(CommitOperationDelete(name) for name in stale)]
    commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    publication.commit, publication.url = commit.oid, f"{api.endpoint}/{repo_id}"
    _compare_hashes(api, repo_id, commit.oid, paths)


def _state_of(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _compare_hashes(api: Any, repo_id: str, commit: str, paths: dict[str, Path]) -> None:
    """Raise unless the repository holds exactly these contents under these names."""
    from huggingface_hub.hf_api import RepoFile

    there = {
        entry.path: entry
        for entry in api.list_repo_tree(repo_id, recursive=True, revision=commit)
        if isinstance(entry, RepoFile)
    }
    wrong = [name for name, path in paths.items() if name not in there or not _same(there[name], path)]
    if wrong:
        raise ValueError(f"{repo_id} at {commit} holds other contents than were sent: {', '.join(wrong)}; push again.")


def _same(entry: Any, path: Path) -> bool:
    if entry.lfs is not None:
        return entry.lfs.sha256 == file_digest(path)
    return entry.blob_id == file_digest(path, hashlib.sha1(b"blob %d\0" % path.stat().st_size))  # as git does


def _collect(publication: ModelPublication, collection: str, private: bool, token: str | None) -> str:
    """Put the repository into a collection, named by slug or title."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = publication.url.removeprefix(f"{api.endpoint}/")
    if "/" not in collection:
        owner = repo_id.split("/")[0]
        collection = api.create_collection(collection, namespace=owner, private=private, exists_ok=True).slug
    return api.add_collection_item(collection, repo_id, "model", exists_ok=True).url


__all__ = ["ModelPublication", "push_to_hub"]
