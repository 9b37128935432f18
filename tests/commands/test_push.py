"""`segcompass push`: what it hands on, what it prints, and one clear line on bad input."""

import json

import pytest
import tiny

from segcompass_hf import cli, hub
from segcompass_hf.hub import ModelPublication


@pytest.fixture
def pushed(monkeypatch):
    """What the function was called with."""
    calls = []

    def record(*args, **kwargs):
        calls.append((args, kwargs))
        published = {} if kwargs["dry_run"] else {"url": "https://hub/me/mine", "commit": "c0ffee"}
        return ModelPublication({"config.json": 1234}, ["all finite"], ["optimizer.pt"], **published)

    monkeypatch.setattr(hub, "push_to_hub", record)
    return calls


def fails(capsys, *argv) -> str:
    code = cli.main(["push", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_everything_is_handed_on(pushed, tmp_path, capsys):
    summary = tmp_path / "summary.json"
    summary.write_text(json.dumps({"metrics": {}, "counts": {}, "versions": {}}))
    (tmp_path / "train.yaml").write_text("learning_rate: 1\n")
    argv = ["push", str(tmp_path), "me/mine", "--private", "--revision", "next", "--base-model", "a/b"]
    argv += ["--message", "m"]
    argv += ["--collection", "C", "--recipe", "r", "--license", "mit", "--evaluation", str(summary), str(tmp_path)]
    argv += ["--training", str(tmp_path / "train.yaml"), "--example", "a.png", "the ring", "--dataset", "d/e"]
    assert cli.main([*argv, "--space", "s/t"]) == 0
    (args, kwargs), out = pushed.pop(), capsys.readouterr().out
    assert args == (tmp_path, "me/mine") and kwargs.pop("evaluations") == [json.loads(summary.read_text())] * 2
    assert kwargs == {
        "private": True, "revision": "next", "dry_run": False, "base_model": "a/b", "collection": "C",
        "commit_message": "m", "recipe": "r", "license": "mit", "datasets": ["d/e"], "space": "s/t",
        "training": "```yaml\nlearning_rate: 1\n```", "examples": [("a.png", "the ring")],
    }  # fmt: skip
    assert out.startswith("https://hub/me/mine:\n  config.json  1.2 kB\n") and 'revision="c0ffee"' in out
    assert "checked: all finite\nnot part of it: optimizer.pt\n" in out

    assert cli.main(["push", "bundled", "me/mine", "--dry-run"]) == 0
    (args, kwargs), out = pushed.pop(), capsys.readouterr().out
    assert args[0].name == "scenes-tiny" and kwargs["dry_run"] and "recipe" not in kwargs
    assert out.startswith("would be published as me/mine:\n") and "revision" not in out


def test_bad_input_is_one_line(tmp_path, capsys):
    assert "there is no folder" in fails(capsys, tmp_path / "nowhere", "me/mine", "--dry-run")
    assert "a//b" in fails(capsys, tmp_path, "a//b", "--dry-run")
    assert "neither config.json" in fails(capsys, tmp_path, "me/mine", "--dry-run")
    assert "no summary of" in fails(capsys, tmp_path, "me/mine", "--evaluation", tmp_path / "x.json")
    assert "cannot read --training" in fails(capsys, tmp_path, "me/mine", "--training", tmp_path / "x.yaml")
    tiny.tiny_model("llava").save_pretrained(tmp_path)
    tiny.tiny_processor("llava").save_pretrained(tmp_path)
    assert "no licence is known" in fails(capsys, tmp_path, "me/mine", "--dry-run")
    assert "no recipe 'nothing'" in fails(capsys, tmp_path, "me/mine", "--dry-run", "--recipe", "nothing")


def test_a_moved_adapter_says_what_it_lacks(tmp_path):
    from segcompass_hf.commands.common import UserError, load_checkpoint

    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/somewhere/else"}))
    with pytest.raises(UserError, match="adapter of the model in '/somewhere/else', which is not on this machine"):
        load_checkpoint(str(tmp_path))


def test_training_that_names_keys_or_folders_is_refused(pushed, tmp_path, capsys):
    path = tmp_path / "train.yaml"
    path.write_text("learning_rate: 1\nhub_token: hf_" + "aB3" * 11)
    assert f"--training {path}, line 2, holds what looks like a Hugging Face token" in fails(
        capsys, tmp_path, "me/mine", "--training", path
    ).replace("a key or password", "a Hugging Face token")
    path.write_text("dataset: folder:/home/me/photos")
    assert f"--training {path}, line 1, holds what looks like a folder of this machine ('/home/me')" in fails(
        capsys, tmp_path, "me/mine", "--training", path
    )
    path.write_text("a: |\n  ```\n  x")
    assert cli.main(["push", str(tmp_path), "me/mine", "--training", str(path)]) == 0
    assert pushed.pop()[1]["training"] == "````yaml\na: |\n  ```\n  x\n````"
