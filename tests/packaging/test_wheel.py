"""What a user installs: the sdist and the wheel as they are built, and the wheel alone in an empty folder.

The wheel goes into an environment of its own, to which this one lends nothing but the dependencies. `make package`
names another by SEGCOMPASS_WHEEL_PYTHON, whose dependencies an index gave.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
from PIL import Image
from places import ROOT

import segcompass_hf
from segcompass_hf.data import scenes
from segcompass_hf.data.schema import decode_masks
from segcompass_hf.metrics import score_sample

pytestmark = pytest.mark.slow

PACKAGE = ROOT / "src" / "segcompass_hf"
MEBIBYTE = 2**20


# Without the import path, which leads to the sources.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}


def run(*command, cwd):
    """What a command printed."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with the sdist and the wheel that was built from it."""
    if find_spec("build") is None:
        pytest.skip("build is not installed: pip install -e '.[dev]'")
    folder = tmp_path_factory.mktemp("dist")
    source = folder / "source"  # a copy: a build leaves files beside setup.py
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).is_file() and not name.startswith(("benchmarks/", "checkpoints/")):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built):
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def python(request, tmp_path_factory):
    """The interpreter of an environment that holds the wheel."""
    named = os.environ.get("SEGCOMPASS_WHEEL_PYTHON")
    if named:
        return Path(named).absolute()
    wheel = request.getfixturevalue("wheel")
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    site = Path(run(interpreter, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    run(sys.executable, "-m", "pip", "--python", interpreter, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    # A folder named in a .pth file is searched last, and what .pth files in it name is not: our own editable install.
    (site / "lent.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return interpreter


@pytest.fixture
def segcompass(python, tmp_path):
    """Runs `segcompass` of the wheel from an empty folder."""

    def command(*arguments):
        return run(python.parent / "segcompass", *arguments, cwd=tmp_path)

    return command


@pytest.fixture
def scene(tmp_path):
    """A sample of Scenes with a target, its picture in the empty folder."""
    row = next(row for row in scenes.iterate("val", 20) if row["masks"])
    row["image"].save(tmp_path / "scene.png")
    return row


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
    ours = {name for name in names if name.startswith("segcompass_hf/")}
    written = {path.relative_to(ROOT / "src").as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert ours == {name for name in written if "__pycache__" not in name}
    assert {"segcompass_hf/py.typed", "segcompass_hf/explain/__init__.pyi"} <= ours
    assert "segcompass_hf/checkpoints/scenes-tiny/model.safetensors" in ours
    assert not any("photos-small/" in name for name in ours)
    assert {name.split("/")[0] for name in names - ours} == {f"segcompass_hf-{segcompass_hf.__version__}.dist-info"}
    assert wheel.stat().st_size < 16 * MEBIBYTE


def test_the_sdist_builds_and_leaves_out_what_only_a_clone_needs(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "NOTICE", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "setup.py"} <= names
    assert {name.split("/")[0] for name in names if "/" in name} == {"src"}


def test_an_index_would_take_both(built):
    pytest.importorskip("twine")
    files = [*built.glob("*.whl"), *built.glob("*.tar.gz")]
    printed = run(sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files, cwd=built)
    assert printed.count("PASSED") == 2


def test_the_package_comes_from_the_wheel(python, tmp_path):
    printed = run(python, "-c", "import segcompass_hf; print(segcompass_hf.__file__)", cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(python.parents[1])


def test_demo(segcompass, tmp_path):
    printed = segcompass("demo", "--samples", 2)
    assert float(re.search(r"mean IoU of these 2 scenes: ([\d.]+)", printed)[1]) > 0.5
    assert Image.open(tmp_path / "out" / "demo" / "overview.png").width > 500


def test_predict(segcompass, scene):
    answer = json.loads(segcompass("predict", "scene.png", scene["instruction"], "--json"))
    size = scene["image"].size[::-1]
    masks = decode_masks([segment["mask"] for segment in answer["segments"]], size)
    assert score_sample(np.asarray(masks), decode_masks(scene["masks"], size)).iou > 0.5


def test_explain(segcompass, scene, tmp_path):
    segcompass("explain", "scene.png", scene["instruction"], "--output", "page.html", "--num-ablations", 1)
    assert scene["instruction"] in (tmp_path / "page.html").read_text("utf-8")


def test_evaluate(segcompass, tmp_path):
    segcompass("evaluate", "--dataset", "scenes:val", "--num-samples", 4, "--output", "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text("utf-8"))
    assert summary["metrics"]["gIoU"]["num_samples"] == 4 and summary["metrics"]["gIoU"]["value"] > 0.5


def test_serve(segcompass, python, tmp_path):
    assert "--space" in segcompass("serve", "--help")
    server = subprocess.Popen(
        [python.parent / "segcompass", "serve"], cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    try:
        address = next(line for line in server.stdout if line.startswith("scenes-tiny: ")).split()[1]
        with urlopen(address, timeout=60) as answer:
            assert "SegCompass" in answer.read().decode()
    finally:
        server.terminate()
        server.communicate(timeout=60)


def test_the_citation_is_of_this_version():
    cited = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.search(r"^version: (.+)$", cited, re.M)[1] == segcompass_hf.__version__
