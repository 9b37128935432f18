"""`segcompass explain`: what it writes and prints, and one clear line on bad input."""

import argparse
import json
from typing import get_args

import pytest
from explanations import INSTRUCTION, made_explanation
from PIL import Image

import segcompass_hf.explain
from segcompass_hf.commands import explain as command
from segcompass_hf.commands.common import UserError
from segcompass_hf.data.schema import decode_mask
from segcompass_hf.explain.explanation import Target


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.new("RGB", (96, 72), "gray").save(path)
    return path


def _run(*arguments):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["explain", *map(str, arguments)])
    args.argv = ["explain", *map(str, arguments)]
    return args.run(args)


@pytest.fixture
def asked(monkeypatch):
    """No checkpoint is loaded; what `explain` is asked for."""
    calls = {}

    def explain(model, processor, image, instruction, **options):
        calls.update(options, instruction=instruction, size=image.size)
        if instruction == "refused":
            raise ValueError("the prompt is too long")
        return made_explanation(num_masks=1, num_concepts=3, kept="unseen" not in instruction)

    class Processor:
        @staticmethod
        def unknown_words(text):
            return ["unheard"] if "unheard" in text else []

    monkeypatch.setattr(
        "segcompass_hf.commands.common.load_checkpoint", lambda name: (None, Processor, "made-by-hand")
    )
    monkeypatch.setitem(vars(segcompass_hf.explain), "explain", explain)  # before it is loaded
    return calls


def test_page_and_summary(asked, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _run(picture, INSTRUCTION, "--num-ablations", 0, "--max-concepts", 7, "--reasoning", "short")
    assert asked == {
        "instruction": INSTRUCTION,
        "size": (96, 72),
        "num_ablations": 0,
        "max_concepts": 7,
        "reasoning": "short",
        "target": "mask_logit",
        "dictionary": None,
    }
    printed = capsys.readouterr().out
    # Shares 1, 1/2 and -1/4 over 5/4.
    assert "+80.0 %  concept 0  red  (without it IoU" in printed and "-20.0 %  concept 2" in printed
    page = tmp_path / "scene.segcompass.html"
    assert printed.splitlines()[-1] == f"page: {page.as_uri()}"
    assert page.read_text("utf-8").startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("target", ["mask_logit", "mask_contrast", "slot_logit"])
def test_every_target(asked, picture, target, capsys):
    assert target in get_args(Target)
    _run(picture, INSTRUCTION, "--target", target, "--json")
    assert asked["target"] == target and len(get_args(Target)) == 3
    for mask in json.loads(capsys.readouterr().out)["masks"]:
        assert list(decode_mask(mask["mask"]).shape) == mask["mask"]["size"]


def test_contributions_are_printed_where_shares_say_nothing(capsys):
    explanation = made_explanation()
    mask = explanation.masks[0]
    mask.value, mask.baseline_value = mask.baseline_value, mask.value  # all concepts together lower it
    command._print(explanation)
    # Contributions are 4 times 1, 1/2, -1/4, 1/8, ... over their sum 1.47; of the second mask shares are shown.
    printed = capsys.readouterr().out
    assert "+2.73  concept 0" in printed and "-0.68  concept 2" in printed and "+68.2 %  concept 100" in printed


def test_json_and_figure(asked, picture, tmp_path, capsys):
    _run(picture, "something unseen", "--json")
    printed = json.loads(capsys.readouterr().out)
    assert printed["file"] is None and printed["masks"][0]["kept"] is False
    assert [concept["feature"] for concept in printed["masks"][0]["concepts"]] == [0, 1, 2]
    _run(picture, "something unseen", "--output", tmp_path / "new" / "figure.png")
    assert Image.open(tmp_path / "new" / "figure.png").size[0] > 1000
    printed = capsys.readouterr().out
    assert "nothing found (best slot 0.20)" in printed and "slot 0, not kept" in printed


@pytest.mark.parametrize(
    ("instruction", "options", "message"),
    [
        (" ", (), "the instruction is empty"),
        ("x", ("--output", "report.txt"), "neither a page"),
        ("refused", (), "the prompt is too long"),
        ("x", ("--dictionary", "nowhere"), "cannot read a concept dictionary from nowhere"),
        ("x", ("--output", "scene.png/report.html"), "cannot make the folder"),
    ],
)
def test_bad_input(asked, picture, tmp_path, monkeypatch, instruction, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        _run(picture, instruction, *options)


def test_bad_image(asked, tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        _run(tmp_path / "none.png", "x")
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(UserError, match="cannot be read as an image"):
        _run(tmp_path / "text.png", "x")


@pytest.fixture
def controls(monkeypatch):
    """No checkpoint is loaded; what `run_controls` is asked for. It writes the two files."""
    calls = {}

    def run_controls(model, processor, rows, output, objects, **options):
        calls.update(options, rows=len(rows), output=output, objects=objects.__name__)
        (output / "controls.md").write_text("# a table\n")
        (output / "controls.json").write_text("{}\n")

    monkeypatch.setattr("segcompass_hf.commands.explain.load_checkpoint", lambda name: (None, None, f"model {name}"))
    monkeypatch.setattr("segcompass_hf.explain.controls.running.run_controls", run_controls)
    return calls


def test_controls_of_a_data_set(controls, tmp_path, capsys):
    words = ("--controls", "--dataset", "scenes:val:3", "--num-samples", 2, "--output", tmp_path / "out")
    _run(*words, "--random-sae", "random")
    assert controls["rows"] == 2 and controls["output"] == tmp_path / "out"
    assert controls["objects"] == "scenes_objects" and controls["others"] == {"random_sae": "random"}
    assert controls["title"] == "model scenes-tiny on scenes val seed 3"
    assert controls["command"].startswith("segcompass explain --controls --dataset scenes:val:3")
    assert capsys.readouterr().out == "# a table\n\n"
    _run(*words, "--json", "--objects", "segcompass_hf.explain:target_objects")
    assert controls["objects"] == "target_objects" and capsys.readouterr().out == "{}\n\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "image and instruction are missing"),
        (("--controls",), "--controls takes --dataset and --output"),
        (("--controls", "--dataset", "scenes:val", "--output", "out", "picture.png"), "neither image nor"),
        (("--controls", "--dataset", "nowhere:1", "--output", "out"), "there is no data set"),
        (
            ("--controls", "--dataset", "scenes:val", "--num-samples", 1, "--output", "out", "--objects", "json:no"),
            "no",
        ),
    ],
)
def test_controls_refuse_in_one_line(controls, arguments, words):
    with pytest.raises(UserError, match=words):
        _run(*arguments)
    assert not controls
