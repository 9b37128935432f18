# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What must not be published: keys, tokens and passwords in texts, folders of this machine, links that lead away."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# What stands behind a name and `:` or `=`: a literal, no expression of code (`config.token`, `token=token`) and no
# placeholder such as $KEY, <key>, hf_... or your-key.
_PLACEHOLDER = r"(?i:your[_-]|(?:hf_|sk-)?(?:x+|\.+|\*+)(?=[\"',;\s]|$))"
_EXPRESSION = r"(?:(?<==)|(?<== ))(?:[A-Za-z_]+(?:\.[A-Za-z_]+)+|[A-Za-z_]*(?:token|key|password|secret))(?![\w.-])"
_VALUE = (
    rf"[\"']?\s*[:=]\s*[\"']?(?!null|none|true|false|self\.|os\.|args\.|{_PLACEHOLDER}|{_EXPRESSION})"
    r"[^\s\"',;{{}}()\[\]$<>]{{{least},}}(?=[\"',;}}\s]|$)"
)
_SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org)_(?![xX]+\b)[A-Za-z0-9]{16,}",
    "a GitHub token": r"\bgh[opsur]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}",
    "a GitLab token": r"\bglpat-[\w-]{16,}",
    "an API key": r"(?<![\w-])sk-(?=[\w-]*\d)[A-Za-z0-9][\w-]{18,}"
    r"|\bAIza[\w-]{30,}|\bnpm_[A-Za-z0-9]{30,}|\bpypi-[\w-]{30,}",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a Slack token": r"\bxox[abeoprs]-[\w-]{10,}",
    "a signed web token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY|PuTTY-User-Key-File",
    "a password in an address": r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{0,200}:[^\s/:@\"'<>]{3,200}@",
    "a signed address": r"(?i:[?&](?:x-amz-signature|x-goog-signature|sig|signature)=[\w%+/-]{16,})",
    "an authorization header": r"(?i:\bauthorization[\"']?\s*[:=]\s*[\"']?(?:basic|bearer|token)\s+\S{8,})",
    "a key or password": (
        r"(?i:(?:(?:api|access|account|wandb|openai)[_-]?key|secret(?:[_-]?(?:access[_-]?)?key)?"
        r"|passw(?:or)?d|passphrase|credentials?|(?<![a-z])(?:pwd|pass)"
        rf"|(?:access|auth|hub|hf|wandb|private|bearer|secret)[_-]?token){_VALUE.format(least=6)})"
        rf"|(?i:(?<![\w-])token{_VALUE.format(least=16)})"
    ),
}
_SECRET = re.compile("|".join(f"(?P<k{number}>{pattern})" for number, pattern in enumerate(_SECRETS.values())))
# Where people's own files lie. Behind a letter, digit, dot or slash it is a part of an address or of a relative path.
_ROOTS = "home|Users|mnt|media|scratch|Volumes|data|workspaces?|nfs|gpfs|lustre|srv|tmp|content|kaggle|export|fsx"
_FOLDER = re.compile(
    rf"(?<![\w./~-])(?:file://)?/(?:(?:{_ROOTS})/[^\s\"'`<>|/\\,;:()\[\]]+|(?:root|private|var/folders)/[^\s\"'`<>|]+)"
    r"|(?<!\w)[A-Za-z]:\\+Users\\+[^\s\"'`<>|/\\,;:]+"
)
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
_VOCABULARIES = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
_SPOKEN = ("instruction", "reasoning")  # columns in which people may speak of folders
_SHOWN = 6  # characters of a secret that a message shows, so that it can be found


def private_places(text: str, folders: bool = True) -> Iterator[tuple[int, str]]:
    """Lines that hold what is nobody else's business: number, from 1, and what it looks like.

    Args:
        text (`str`): Any.
        folders (`bool`, *optional*, defaults to `True`): Look for folders of this machine too, beside keys.

    Example:

    >>> list(private_places("lr: 1\\ndata: /home/me/photos"))
    [(2, "a folder of this machine ('/home/me')")]
    """
    for number, line in enumerate(text.splitlines(), start=1):
        for match in _SECRET.finditer(line):
            kind = list(_SECRETS)[int(match.lastgroup[1:])]
            yield number, f"{kind} ({match[0][:_SHOWN]!r}...)"
        for found in _folders_in(line) if folders else ():
            yield number, f"a folder of this machine ({found!r})"


def _folders_in(line: str) -> list[str]:
    home = str(Path.home())
    found = [match[0] for match in _FOLDER.finditer(line)]
    if home.count(os.sep) > 1 and home in line and not any(home in one for one in found):
        found.append(home)
    return found


def check_publishable(name: str, text: str, folders: bool = True) -> None:
    """Refuse a text that holds a key, token or password, or a folder of this machine.

    Args:
        name (`str`): What the message calls it: a file, an argument.
        text (`str`): What would be published.
        folders (`bool`, *optional*, defaults to `True`): See [`private_places`].

    Raises:
        ValueError: It does, with the line and what to do.
    """
    for number, what in private_places(text, folders):
        raise ValueError(
            f"{name}, line {number}, holds what looks like {what}, which would be published; take it out (a key that "
            "was shown to others has to be revoked too)."
        )


def check_values(name: str, value: Any) -> None:
    """[`check_publishable`] of every text in nested lists and dictionaries, with its place."""
    if isinstance(value, dict):
        for key, item in value.items():
            check_publishable(name, str(key))
            check_values(f"{name}, {key}", item)
            if isinstance(item, str):  # a key says what its value is
                check_publishable(name, f"{key}: {item}", folders=False)
    elif isinstance(value, (list, tuple)):
        for item in value:
            check_values(name, item)
    elif isinstance(value, (str, os.PathLike)):
        check_publishable(name, str(value))


def check_file(path: Path, name: str | None = None) -> None:
    """[`check_publishable`] of what a file says: a text as a whole, of weights and tables what is beside the numbers.

    Pictures are passed over. Vocabularies may hold any word, so that of them only keys are told.

    Args:
        path (`Path`): The file.
        name (`str`, *optional*): What a message calls it; its name by default.

    Raises:
        ValueError: Something must not be published, or the text is not UTF-8.
    """
    name = name or path.name
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                header = file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{name} cannot be read ({error}); is it cut short?") from error
        check_values(f"the header of {name}", header)
    elif path.suffix == ".parquet":
        _check_table(path, name)
    elif path.suffix.lower() not in PICTURES:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is no UTF-8 text ({error}), so that nobody can tell what it holds.") from error
        check_publishable(name, text, folders=path.name not in _VOCABULARIES)
        if path.suffix == ".json" and path.name not in _VOCABULARIES:
            try:
                content = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} is no JSON: {error}") from error
            check_values(name, content)  # also what stands there in escapes


def _check_table(path: Path, name: str) -> None:
    """Texts of a Parquet file, a row group at a time; masks and the bytes of pictures are none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            stated = {key.decode(errors="replace"): text for key, text in (table.metadata.metadata or {}).items()}
            for key in stated.keys() - {"ARROW:schema"}:
                check_publishable(f"the header of {name}", f"{key}: {stated[key].decode(errors='replace')}")
            leaves = [table.schema.column(index) for index in range(len(table.schema))]
            texts = [leaf.path for leaf in leaves if leaf.logical_type.type == "STRING" and leaf.name != "counts"]
            for group in range(table.num_row_groups if texts else 0):
                for column in texts:
                    values = _texts_of(table.read_row_group(group, columns=[column]).columns[0])
                    words = column.split(".")[0] in _SPOKEN
                    check_publishable(f"{name}, column {column}, row group {group}", "\n".join(values), not words)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{name} is no Parquet file that can be read: {error}") from error


def _texts_of(array: Any) -> list[str]:
    """Every text once, of a column of texts that may lie in lists and structures."""
    import pyarrow as pa

    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_struct(array.type):
        return [text for child in array.flatten() for text in _texts_of(child)]
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _texts_of(array.flatten())
    return [text for text in array.unique().to_pylist() if text]


def without_folders(value: Any) -> Any:
    """A report with the names of files but not of the folders they lie in, which are nobody's business."""
    if isinstance(value, dict):
        return {without_folders(key): without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    if not isinstance(value, str):
        return value
    value = re.sub(r"(['\"])(?:/|~/|[A-Za-z]:\\)(?:(?!\1).)*[/\\]((?:(?!\1)[^/\\])+)\1", r"\1\2\1", value)
    folders = (
        r"(?<![\w./-])(?:~?/(?!/)|[A-Za-z]:\\)(?:[^\s'\"/\\:,;()]+[/\\])+(?=[^\s/\\])"  # not behind a scheme's ://
    )
    return re.sub(folders, "", value)


def check_inside(path: Path, folder: Path) -> None:
    """Refuse a file that is not in the folder but linked from it.

    The folder itself may be a link, and files of a snapshot in the Hub's cache lie in that cache's `blobs`.

    Args:
        path (`Path`): Of a file below `folder`.
        folder (`Path`): What is published.

    Raises:
        ValueError: The link leads out of the folder.
    """
    root, real = Path(os.path.realpath(folder)), Path(os.path.realpath(path))
    roots: Sequence[Path] = (root, root.parents[1] / "blobs") if root.parent.name == "snapshots" else (root,)
    if not any(real.is_relative_to(one) for one in roots):
        raise ValueError(
            f"{path.relative_to(folder).as_posix()!r} is a link out of the folder {str(folder)!r}, and its target "
            "would be published; put the file itself there, or take the link away."
        )


__all__ = [
    "PICTURES",
    "check_file",
    "check_inside",
    "check_publishable",
    "check_values",
    "private_places",
    "without_folders",
]
