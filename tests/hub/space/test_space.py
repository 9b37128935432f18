"""The files of a Space, and `segcompass serve` without serving."""

import ast

import pytest

import segcompass_hf
from segcompass_hf.cli import main
from segcompass_hf.hub.space.write import write_space

pytest.importorskip("gradio", reason="a Space names the release of gradio it was written with")


def test_files_name_the_model_and_the_package(tmp_path):
    readme, app, requirements = write_space(tmp_path / "space", "someone/segcompass", "./a-1.0-py3-none-any.whl")
    head = readme.read_text("utf-8").split("---")[1]
    assert "sdk: gradio\n" in head and "models:\n- someone/segcompass\n" in head and "app_file: app.py" in head
    assert '"someone/segcompass"' in app.read_text("utf-8") and "{{" not in app.read_text("utf-8")
    ast.parse(app.read_text("utf-8"))
    assert requirements.read_text("utf-8") == "./a-1.0-py3-none-any.whl\n"


def test_without_a_model_the_bundled_one_is_served(tmp_path):
    readme, _, requirements = write_space(tmp_path)
    assert "models:" not in readme.read_text("utf-8")
    assert requirements.read_text("utf-8") == f"segcompass_hf[explain,data]=={segcompass_hf.__version__}\n"


def test_a_folder_that_looks_like_an_id_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    with pytest.raises(ValueError, match="'runs/mine' is a path on this machine"):
        write_space(tmp_path / "space", "runs/mine")
    assert not (tmp_path / "space").exists()


def test_command(tmp_path, capsys):
    assert main(["serve", "--space", str(tmp_path / "new")]) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["README.md", "app.py", "requirements.txt"]
    assert "README.md, app.py, requirements.txt" in capsys.readouterr().out
    assert main(["serve", "--space", str(tmp_path), "--model", "/a/folder"]) == 2
    assert "is no id on the Hub" in capsys.readouterr().err
    assert main(["serve", "--package", "x"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["serve", "--port", "70000"])
    assert stopped.value.code == 2
