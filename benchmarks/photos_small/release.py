"""A trained photos-small -> `checkpoints/photos-small`, as it is committed:

    python benchmarks/photos_small/release.py runs/photos-small/checkpoint --rows runs/photos-small/rows:train

The folder may also be one of the segmentation stage or of its checkpoints. What is written is in bfloat16, loads in
float32, names the words of the training instructions, and has neither code nor what training leaves. A concept
dictionary is written into it afterwards, by `concepts.py`, and the card last, by `card.py`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from segcompass_hf import SegCompassProcessor
from segcompass_hf.evaluation import load_dataset_of
from segcompass_hf.files import readable_size, staged_folder
from segcompass_hf.hub.conversion.files import open_weights, write_shards
from segcompass_hf.hub.publishing.stage import INDEX, KEPT, SHARDS, WEIGHTS
from segcompass_hf.training.recipe.running import write_checkpoint
from segcompass_hf.training.recipe.settings import RecipeSettings

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples" / "photos_small"))
from cut_tokenizer import read_in_small_letters  # noqa: E402

TARGET = ROOT / "checkpoints" / "photos-small"
MOST_BYTES = 120_000_000  # of the folder
SHARD_BYTES = 60_000_000  # hosts of repositories refuse files above 100 MB


def release(trained: Path, instructions: Iterable[str], target: Path = TARGET, most_bytes: int = MOST_BYTES) -> int:
    """Write the folder, in place of one that is there.

    Args:
        trained (`Path`): A SegCompass with its processor, of any stage or step.
        instructions (`Iterable[str]`): Those that it was trained on.
        target (`Path`): Where to.
        most_bytes (`int`): That it may have.

    Returns:
        `int`: bytes of the folder.

    Raises:
        ValueError: It is larger, or the target holds something else than a checkpoint; nothing is changed then.
    """
    if target.exists() and not (target / "config.json").is_file():
        raise ValueError(f"{target} is there and holds no config.json; move what it holds elsewhere.")
    new = target.with_name(f"{target.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    settings = RecipeSettings(output_dir=str(new), dtype="float32", save_dtype="bfloat16")
    with staged_folder(new) as folder:
        write_checkpoint(trained, folder, settings)
        processor = SegCompassProcessor.from_pretrained(folder)
        read_in_small_letters(processor.tokenizer)  # trained before the example's own tokenizer did
        processor.add_trained_words(instructions)
        processor.save_pretrained(folder)
        if (folder / WEIGHTS).stat().st_size > SHARD_BYTES:
            write_shards(folder, open_weights(folder), SHARD_BYTES)
            (folder / WEIGHTS).unlink()
        for path in folder.iterdir():
            if path.name not in (*KEPT, WEIGHTS, INDEX) and not path.match(SHARDS):
                path.unlink()
        size = sum(path.stat().st_size for path in folder.iterdir())
        if size > most_bytes:
            raise ValueError(f"the checkpoint has {readable_size(size)}, but at most {readable_size(most_bytes)} fit.")
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("--rows", default="runs/photos-small/rows:train", help="what it was trained on")
    given = parser.parse_args()
    size = release(given.trained, load_dataset_of(given.rows).dataset["instruction"])
    print(f"{TARGET}: {readable_size(size)}")


if __name__ == "__main__":
    main()
