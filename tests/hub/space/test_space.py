"""The files of a Space, and `segcompass serve` without serving."""

import ast
import shlex

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


def test_packages_hold_no_token_and_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="package, line 1, holds what looks like a password in an address"):
        write_space(tmp_path / "space", package="git+https://me:s3cret@example.org/x")
    with pytest.raises(ValueError, match="package, line 1, holds .*'/home/me'"):
        write_space(tmp_path / "space", package="/home/me/a.whl")
    for package in ("a\nb", " "):
        with pytest.raises(ValueError, match="expected a line for requirements.txt"):
            write_space(tmp_path / "space", package=package)
    assert not (tmp_path / "space").exists()


def test_a_link_is_replaced_and_other_files_stay_where_they_are(tmp_path, capsys):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a space").mkdir()
    (tmp_path / "a space" / "README.md").symlink_to("../mine")
    (tmp_path / "a space" / ".env").write_text("private")
    assert main(["serve", "--space", str(tmp_path / "a space"), "--package", "x-1.0-py3-none-any.whl"]) == 0
    assert (tmp_path / "mine").read_text() == "mine" and not (tmp_path / "a space" / "README.md").is_symlink()
    upload = shlex.split(capsys.readouterr().out.splitlines()[-1].partition(": ")[2])
    assert upload[:5] == ["hf", "upload", "OWNER/NAME", str(tmp_path / "a space"), "."]
    included = [name for flag, name in zip(upload, upload[1:], strict=False) if flag == "--include"]
    assert included == ["README.md", "app.py", "requirements.txt", "x-1.0-py3-none-any.whl"]
