# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Files and folders that are there whole or not at all; free space, sizes to read, and digests."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .locks import alone_with

STAGED_SUFFIX = ".unfinished"  # of a folder that is being written
PART_SUFFIX = ".part"  # of a file that is being written
SAFETENSORS_PART = ".tmp??????"  # pattern of the names under which safetensors writes before it renames
_BLOCK = 1 << 20  # bytes read at a time for a digest


@contextmanager
def whole_file(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write to; the file becomes `path` when the block ends, and goes when it fails.

    A reader meets the old file or the new one, never half of one, and of two processes that write one file the last
    one counts. What a kill leaves is removed by the next one on this machine that writes into the same folder. Modes
    follow the umask, also where the writer makes private files, as safetensors does.

    Args:
        path (`str` or `os.PathLike`): What the file is called in the end; its folder is made where it is missing.
        durable (`bool`, *optional*, defaults to `False`): Wait until the file and its name would survive a power cut.

    Raises:
        OSError: The file cannot be written, for example because the disk is full; what was there before stays.

    Example:

    ```python
    >>> with whole_file("model.safetensors") as unfinished:  # doctest: +SKIP
    ...     save_file(weights, unfinished)
    ```
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_beside(path)
    try:
        with full_disk_in_words(path.parent):
            with open(part, "xb"):  # as the umask has it
                mode = part.stat().st_mode
            yield part
            if part.stat().st_mode != mode:
                with suppress(OSError):  # some mounted disks have one mode for all
                    part.chmod(mode)
            if durable:
                flush_to_disk(part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if durable:
        flush_to_disk(path.parent)


def write_whole(path: str | os.PathLike, content: str | bytes, durable: bool = False) -> None:
    """Write a file so that a kill leaves the old one or the new one; see [`whole_file`]. Text is written as UTF-8;
    halves of characters, which have none, as their escapes."""
    with whole_file(path, durable) as part:
        part.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


def read_json_object(path: str | os.PathLike, remedy: str = "write it again") -> dict[str, Any]:
    """A JSON object that this package or transformers has written.

    Args:
        path (`str` or `os.PathLike`): Of the file.
        remedy (`str`, *optional*): What the message says to do about a damaged one.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON, or no object.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged ({error}); {remedy}.") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{os.fspath(path)} is damaged (it holds a {type(content).__name__}, expected an object); {remedy}."
        )
    return content


def part_beside(path: str | os.PathLike) -> Path:
    """A new name beside `path` for what becomes it; those of killed processes of this machine are removed."""
    path = Path(path)
    _remove_dead(path.parent, "", PART_SUFFIX)
    return path.with_name(f"{path.name[:120]}.{_this_process()}-{uuid.uuid4().hex[:8]}{PART_SUFFIX}")


def temporary_folder(kind: str) -> tempfile.TemporaryDirectory:
    """A temporary folder that goes with its block; what killed processes left is removed by the next of its kind.

    Args:
        kind (`str`): What it is for, in a word.
    """
    start = f"segcompass-{kind}."
    _remove_dead(Path(tempfile.gettempdir()), start, "")
    return tempfile.TemporaryDirectory(prefix=f"{start}{_this_process()}-")


def _this_process() -> str:
    return f"{_machine()}-{os.getpid()}"


def _machine() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _remove_dead(folder: Path, start: str, end: str) -> None:
    """Remove what processes of this machine made in a folder that have ended: `<start>..<machine>-<pid>-..<end>`."""
    pattern = re.compile(rf"{re.escape(start)}(?:.*\.)?{_machine()}-(\d+)-\w+{re.escape(end)}")
    for name in os.listdir(folder):
        found = pattern.fullmatch(name)
        if found and not _is_alive(int(found[1])):
            path = folder / name
            with suppress(OSError):  # another user's
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_alive(process: int) -> bool:
    if os.name == "nt":
        return True  # where signal 0 would end it
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it is another user's
    return True


def flush_to_disk(path: str | os.PathLike) -> None:
    """Wait until a file, or the names in a folder, would survive a power cut: a rename may else come before them."""
    if os.name == "nt":
        return  # it flushes neither folders nor files opened to read
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def follow_umask(folder: str | os.PathLike) -> None:
    """Give files that are their owner's alone the modes of the folder they lie in.

    safetensors makes private files whatever the umask, so that others on a shared disk could not read a checkpoint.
    """
    for path in Path(folder).rglob("*"):
        if path.is_symlink() or not path.is_file():
            continue
        mode = path.stat().st_mode
        if not mode & 0o077:
            with suppress(OSError):  # some mounted disks have one mode for all
                path.chmod(mode | (path.parent.stat().st_mode & 0o666))


def check_new_folder(output: str | os.PathLike) -> Path:
    """The path of a folder to be made; one that is there and empty will do.

    Raises:
        FileExistsError: Something is there already.
    """
    output = Path(output).expanduser()
    if output.is_dir() and not any(output.iterdir()):
        return output
    if output.is_symlink() or output.exists():
        what = f"holds {sum(1 for _ in output.iterdir())} files" if output.is_dir() else "is a file"
        raise FileExistsError(f"{output} {what} already, and nothing is overwritten; name another folder.")
    return output


@contextmanager
def staged_folder(output: str | os.PathLike) -> Iterator[Path]:
    """A folder beside `output` to write into; it becomes `output` when the block ends, and goes when it fails.

    A kill leaves `<output>.unfinished` behind, which the next start replaces. Of two processes that write one folder
    the second is refused.

    Args:
        output (`str` or `os.PathLike`): What the folder is called in the end; must not exist, or be empty.

    Raises:
        FileExistsError: Something is there already, has appeared meanwhile, or another process is writing it.
    """
    output = check_new_folder(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(output.name + STAGED_SUFFIX)
    refusal = f"another build is writing {output}; wait for it, or name another folder."
    with alone_with(output.with_name(f".{output.name}.lock"), refusal):
        try:
            with full_disk_in_words(output.parent):
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir()
                yield staged
                follow_umask(staged)
                _take_place(staged, output)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _take_place(staged: Path, output: Path) -> None:
    check_new_folder(output)
    try:
        if output.is_dir():
            output.rmdir()
        os.replace(staged, output)
    except OSError as error:
        check_new_folder(output)  # which says so where another process was faster
        raise error


def free_space(path: str | os.PathLike) -> int:
    """Bytes that are free on the disk of a file or folder, which need not be there yet."""
    path = Path(path).absolute()
    return shutil.disk_usage(next(place for place in (path, *path.parents) if place.exists())).free


def check_disk_space(folder: Path, num_bytes: int) -> None:
    """Refuse to start writing what does not fit.

    Args:
        folder (`Path`): Where to write; it exists.
        num_bytes (`int`): What will be written.

    Raises:
        OSError: There is less space.
    """
    free = free_space(folder)
    if num_bytes > free:
        raise OSError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and {num_bytes / 1e9:.1f} GB are to be written; make room, "
            "or name a folder on another disk."
        )


@contextmanager
def full_disk_in_words(folder: str | os.PathLike) -> Iterator[None]:
    """Whatever an error inside is that comes of a full disk, say so: safetensors and torch have words of their own.

    Raises:
        OSError: With `errno.ENOSPC`; says where there is how little space.
    """
    try:
        yield
    except Exception as error:
        free = free_space(folder)
        if not _is_of_full_disk(error, free):
            raise
        text = (
            f"the disk of {Path(folder).absolute()} is full ({readable_size(free)} free); make room and start again."
        )
        full = OSError(text)
        full.errno = errno.ENOSPC
        raise full from error


def _is_of_full_disk(error: Exception, free: int) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    told = f"(os error {errno.ENOSPC})", f"(os error {errno.EDQUOT})"  # safetensors, which removes its part
    return str(error).endswith(told) or (
        isinstance(error, RuntimeError) and free < _BLOCK and "unexpected pos" in str(error)
    )


def readable_size(num_bytes: float) -> str:
    """A number of bytes for people, in steps of 1000.

    Example:

    >>> readable_size(999), readable_size(1_500_000), readable_size(2_000_000_000_000)
    ('999 B', '1.5 MB', '2000.0 GB')
    """
    if num_bytes < 1000:
        return f"{num_bytes:.0f} B"
    for unit in ("kB", "MB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:.1f} {unit}"
    return f"{num_bytes / 1000:.1f} GB"


def file_digest(path: str | os.PathLike, digest: Any = None) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Args:
        path: of the file; a block of it is in memory at a time.
        digest (*optional*): A `hashlib` object to go on with instead, of whatever kind.
    """
    digest = hashlib.sha256() if digest is None else digest
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(weights: Any) -> str:
    """SHA-256 of a torch module's weights and buffers, or of named ones, in hexadecimal: of every value, its place,
    name and dtype.

    The same on every device. A tensor at a time is in the memory of the host; a gigabyte takes a second or two.

    Args:
        weights (`torch.nn.Module` or `Mapping[str, torch.Tensor]`): As it is in memory.
    """
    import torch

    digest = hashlib.sha256()
    named = weights if isinstance(weights, Mapping) else weights.state_dict()
    for name, tensor in sorted(named.items()):
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def folder_digest(folder: str | os.PathLike) -> str:
    """SHA-256 of the names and contents of all files in a folder and its folders, in hexadecimal."""
    folder = Path(folder)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return json_digest({name: file_digest(folder / name) for name in names})


def json_digest(value: Any) -> str:
    """SHA-256 of a value as json, in hexadecimal: the order of keys does not count.

    Raises:
        TypeError: It holds something else than what json does.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


__all__ = [
    "check_disk_space",
    "check_new_folder",
    "file_digest",
    "flush_to_disk",
    "folder_digest",
    "follow_umask",
    "free_space",
    "full_disk_in_words",
    "json_digest",
    "part_beside",
    "read_json_object",
    "readable_size",
    "staged_folder",
    "temporary_folder",
    "weights_digest",
    "whole_file",
    "write_whole",
]
