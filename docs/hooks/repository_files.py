# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Links out of docs/, such as `../../benchmarks/results/scenes.md`, work in the repository and on the site alike.

The files that they name, and those that these name, are put on the site under `repository/`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

FOLDER = "repository"
_LINK = re.compile(r"(\]\(|^\[[^\]]+\]: |<img src=\")([^)\s\"#]+)")  # ends before an anchor


def place_in_repository(uri: str) -> PurePosixPath:
    """Where a file of the site lies in the repository."""
    path = PurePosixPath(uri)
    return path.relative_to(FOLDER) if path.parts[0] == FOLDER else "docs" / path


def place_on_site(path: PurePosixPath) -> str:
    """The other way round."""
    return str(path.relative_to("docs")) if path.parts[0] == "docs" else f"{FOLDER}/{path}"


def rewritten(text: str, uri: str, root: Path, found: Callable[[str], None] = lambda uri: None) -> str:
    """The Markdown of a page with its links to files of the repository turned into links to the site.

    Args:
        text (`str`): The page.
        uri (`str`): Its place on the site.
        root (`Path`): Folder of the repository.
        found (`Callable`, *optional*): Is told every file's place on the site.
    """
    folder = place_in_repository(uri).parent

    def moved(link: re.Match) -> str:
        path = PurePosixPath(os.path.normpath(folder / link[2]))
        if "://" in link[2] or path.parts[0] == ".." or not (root / path).is_file():
            return link[0]  # mkdocs reports what leads nowhere
        target = place_on_site(path)
        found(target)
        return link[1] + os.path.relpath(target, PurePosixPath(uri).parent)

    return _LINK.sub(moved, text)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    from mkdocs.structure.files import File, InclusionLevel

    root = Path(config.config_file_path).parent
    waiting = [file for file in files if file.is_documentation_page()]
    while waiting:
        file = waiting.pop()

        def add(uri: str) -> None:
            if uri not in files.src_uris:
                source = str(root / place_in_repository(uri))
                added = File.generated(config, uri, abs_src_path=source, inclusion=InclusionLevel.NOT_IN_NAV)
                files.append(added)
                waiting.extend([added] if added.is_documentation_page() else [])

        rewritten(file.content_string, file.src_uri, root, add)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return rewritten(markdown, page.file.src_uri, Path(config.config_file_path).parent)
