# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""What the documentation's pages hold: code blocks, command lines, links."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), README]
_FENCE = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n+)?^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$",
    re.M | re.S,
)
_LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass
class Block:
    """A fenced block of code.

    Args:
        page (`Path`): Where it stands.
        line (`int`): Its first line of code there, from 1.
        language (`str`): What follows the fence, such as `python`.
        code (`str`): What stands in it.
        why_not_run (`str`, *optional*): What `<!-- not run: ... -->` before it says.
    """

    page: Path
    line: int
    language: str
    code: str
    why_not_run: str | None


def blocks(page: Path, text: str | None = None) -> list[Block]:
    """All of a page's; `text` stands for what is in it."""
    text = page.read_text("utf-8") if text is None else text
    found = []
    for match in _FENCE.finditer(text):
        code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.M)
        line = text.count("\n", 0, match.start("code")) + 1
        found.append(Block(page, line, match["language"], code, match["why"]))
    return found


def command_lines(code: str) -> Iterator[list[str]]:
    """The words of every command of a shell block, without comments, variables before it and what is behind a `|`."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for mark in ("|", ">", "&&"):
            words = words[: words.index(mark)] if mark in words else words
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            yield words


def segcompass_arguments(words: list[str]) -> list[str] | None:
    """What a command line gives to `segcompass`, also as a module below a launcher; `None` where it starts others."""
    if words[0] == "segcompass":
        return words[1:]
    return words[words.index("segcompass_hf.cli") + 1 :] if "segcompass_hf.cli" in words else None


def links(page: Path) -> list[str]:
    """Relative links of a page, without their anchors, those in code left out."""
    text = re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page.read_text("utf-8")))
    addresses = [address.partition("#")[0] for address in _LINK.findall(text)]
    return [address for address in addresses if address and "://" not in address]


def flags_in_prose(page: Path) -> Iterator[tuple[str, set[str]]]:
    """Command and flags of every `segcompass ...` that stands between backticks in a page's text."""
    for code in re.findall(r"`(segcompass [^`]*)`", _FENCE.sub("", page.read_text("utf-8"))):
        words = re.findall(r"[\w./-]+", code)[1:]
        command = " ".join(words[:2] if words[:1] == ["data"] else words[:1])
        if command not in ("", "COMMAND"):
            yield command, {word for word in words if word.startswith("--")}


def sentences(text: str) -> list[str]:
    """What a reader reads aloud: sentences of paragraphs, headings and list items, without code blocks and tables."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`\n]+`", "code", _FENCE.sub("\n", text)))
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=[-#|])", text):
        line = re.sub(r"^[-#*\s]+", "", " ".join(paragraph.split()))
        if line and not line.startswith("|"):
            found += re.split(r"(?<=[.!?])\s+(?=[A-Z])", line)
    return found
