# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Every page of the documentation: Python runs, commands are ones that the parser takes, what it names exists."""

import contextlib
import io
import json
import re
from functools import cache

import pytest
from documents import (
    PAGES,
    README,
    ROOT,
    blocks,
    command_lines,
    flags_in_prose,
    links,
    segcompass_arguments,
    sentences,
)

from segcompass_hf.cli import _parser
from segcompass_hf.data import scenes
from segcompass_hf.training import read_recipe

MAX_LINES = 200
NAMED_FILE = re.compile(r"(?<![\w/.-])(?:docs|examples|benchmarks|tests|model_cards|docker|src)(?:/[\w.-]+)+\.\w+\b")
SITE = [page for page in PAGES if page.is_relative_to(ROOT / "docs")]


def name(page):
    return str(page.relative_to(ROOT))


@cache
def parser():
    return _parser()


@cache
def flags_of_commands():
    return {command: set(re.findall(r"--[\w-]+", text)) for command, text in helps(parser())}


def python_blocks(page):
    return [block for block in blocks(page) if block.language == "python"]


def labelled_files(root, image):
    """One picture and object as LabelMe and YOLO write them."""
    for folder in ("my_drawings", "my_yolo/images", "my_yolo/labels"):
        (root / folder).mkdir(parents=True)
    shape = {"label": "dog", "points": [[10, 10], [60, 10], [60, 60]]}
    image.save(root / "my_drawings" / "0.png")
    (root / "my_drawings" / "0.json").write_text(json.dumps({"imagePath": "0.png", "shapes": [shape]}))
    image.save(root / "my_yolo" / "images" / "0.png")
    (root / "my_yolo" / "labels" / "0.txt").write_text("0 0.1 0.1 0.6 0.1 0.6 0.6\n")
    (root / "my_yolo" / "data.yaml").write_text("train: images\nnames: [dog, cat]\n")


@pytest.fixture
def newcomers_folder(tmp_path, monkeypatch):
    """What pages speak of: `photo.png` (a scene), two annotated pictures in `my_pictures`, and `labelled_files`."""
    (tmp_path / "my_pictures").mkdir()
    rows = list(scenes.iterate("val", 2, seed=5))
    rows[0]["image"].save(tmp_path / "photo.png")
    lines = []
    for number, row in enumerate(rows):
        row["image"].save(tmp_path / "my_pictures" / f"{number}.png")
        lines.append({"image": f"{number}.png", "instruction": row["instruction"], "masks": row["masks"]})
    labelled_files(tmp_path, rows[0]["image"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "my_pictures" / "annotations.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name)
def test_python_runs(page, newcomers_folder):
    """Blocks of a page run one after the other, as a reader would type them."""
    names = {"__name__": "__main__"}
    for block in python_blocks(page):
        code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
        if block.why_not_run is None:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_are_ones(page, capsys):
    for block in blocks(page):
        for words in command_lines(block.code) if block.language in ("bash", "sh") else ():
            arguments = segcompass_arguments(words)
            if arguments is not None:
                try:
                    parser().parse_args(arguments)
                except SystemExit as end:
                    if end.code:
                        pytest.fail(f"{page}, line {block.line}: {' '.join(words)}\n{capsys.readouterr().err}")


def test_recipes_are_ones(tmp_path):
    """Yaml that has an `output_dir` is a recipe."""
    recipes = [block for page in SITE for block in blocks(page) if re.search("^output_dir:", block.code, re.M)]
    assert recipes
    for block in recipes:
        (tmp_path / "recipe.yaml").write_text(block.code)
        assert read_recipe(tmp_path / "recipe.yaml").stages


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_flags_in_prose_are_ones(page):
    known = flags_of_commands()
    for command, flags in flags_in_prose(page):
        assert command in known, f"there is no segcompass {command}"
        assert not flags - known[command], f"segcompass {command} has no {flags - known[command]}"


def helps(group):
    """Every command's name without `segcompass`, and its help."""
    for action in group._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield command.prog.partition(" ")[2], command.format_help()
                yield from helps(command)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    targets = [(page.parent / link).resolve() for link in links(page)]
    made = [ROOT / "docs" / "reference" / name for name in ("cli.md", "configs.md")]  # with the site, see docs/hooks
    missing = [path for path in targets if not path.exists() and path not in made and path.parent.name != "api"]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_that_it_names_are_there(page):
    missing = [file for file in NAMED_FILE.findall(page.read_text("utf-8")) if not (ROOT / file).exists()]
    assert not missing


@pytest.mark.parametrize("page", [page for page in SITE if page.name != "backbones.md"], ids=name)
def test_a_page_is_read_in_one_sitting(page):
    assert len(page.read_text("utf-8").splitlines()) <= MAX_LINES


def test_the_readme_is_read_in_a_minute():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 120
    too_long = [sentence for sentence in sentences(text) if len(sentence.split()) > 30]
    assert not too_long


def test_sentences():
    text = (
        "# Title\n\nOne [two](a.b.c) three\n`a.b --c d`. Four?\n\n- five 0.89 [0.8, 0.9]: six\n- seven\n\n| eight. |\n"
    )
    assert sentences(text) == ["Title", "One two three code.", "Four?", "five 0.89 [0.8, 0.9]: six", "seven"]
    assert sentences("a\n\n```bash\nb. c\n```\n\n![d](e)") == ["a", "d"]


def test_pages_that_code_names_are_there():
    named = re.compile(r"\bdocs/[\w/-]+\.md\b")
    files = [
        *ROOT.glob("*.*"),
        ROOT / "Makefile",
        *(
            file
            for top in ("src", "examples", "benchmarks", "tests")
            for file in (ROOT / top).rglob("*")
            if file.suffix in (".py", ".yaml", ".md", ".sh")
        ),
    ]
    dead = {
        f"{name(file)}: {page}"
        for file in files
        if file.is_file() and file.name not in ("CHANGELOG.md", "test_private_text.py")
        for page in named.findall(file.read_text("utf-8", errors="replace"))
        if not (ROOT / page).exists()
    }
    assert not dead
