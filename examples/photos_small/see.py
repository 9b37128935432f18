"""Teaches photos-small to see in words, before the warm-up: image tokens become like the words for what they show.

    python examples/photos_small/see.py --output runs/photos-small

Reads the VLM of `parts.py` and the split `train` of `rows.py`, and writes `vlm_seeing`: the same VLM with another
projector and other last blocks of the vision encoder. They are trained for four epochs on the photographs and on parts
of them, cut at random and mirrored, to name the cells of the encoder's map by the nearest embedding among those of the
80 categories' words, which stay as they are. What a cell should be called are the shares of it that the categories
cover. The language model then reads image tokens that say what is there. Started again, it goes on at its last
checkpoint.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from seen import is_crowded, is_place, named_objects
from torch import nn
from torch.nn import functional
from transformers import AutoModelForImageTextToText, AutoProcessor, Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from views import View
from words import CATEGORIES

from segcompass_hf.evaluation import load_dataset_of
from segcompass_hf.images_segcompass import to_rgb_image

FIRST_TRAINED = 15  # of 21 blocks: those at stride 32
LEARNING_RATE = 1e-3
ENCODER_FACTOR = 0.2  # times the learning rate; at the same one the encoder forgets what ImageNet taught it
SMALLEST = 0.6  # of a side: parts of a photograph
WHOLE = 0.5  # share of the photographs that are shown as a whole
SCALE = 15.0  # of cosines, at the start
NOTHING = len(CATEGORIES)  # what is none of the categories
NUMBERS = {name: number for number, name in enumerate(CATEGORIES)}


class CellNaming(nn.Module):
    """The way from pixels to image tokens, and what turns those into names: cosines with the categories' words.

    Cosines are taken from the middle of all embeddings, since any two of them point the same way from zero.

    Args:
        vlm (`FastVlmForConditionalGeneration`): Its encoder and projector are trained in place.
        words (`list[list[int]]`): Token ids of every category; the embedding of a category is their mean.
    """

    def __init__(self, vlm: nn.Module, words: list[list[int]], first_trained: int = FIRST_TRAINED):
        super().__init__()
        self.encoder, self.projector = vlm.model.vision_tower, vlm.model.multi_modal_projector
        rows = vlm.get_input_embeddings().weight.detach()
        self.register_buffer("middle", rows.mean(0))
        self.register_buffer("words", torch.stack([rows[ids].mean(0) for ids in words]) - self.middle)
        self.nothing = nn.Parameter(rows.std(0) * torch.randn_like(self.middle))
        self.scale, self.bias = nn.Parameter(torch.tensor(SCALE).log()), nn.Parameter(torch.zeros(NOTHING + 1))
        self.encoder.embeddings.requires_grad_(False)
        self.encoder.encoder.blocks[:first_trained].requires_grad_(False)

    def train(self, mode: bool = True) -> CellNaming:
        """Batch norms keep ImageNet's statistics: the encoder is used with them, whatever the batch."""
        super().train(mode)
        self.encoder.eval()
        return self

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cross-entropy over cells.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, 3, height, width)`): Normalised.
            labels (`torch.Tensor` of shape `(batch, cells, 81)`): Shares of each cell, row after row, sum 1.
        """
        pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        cells = self.encoder(pixel_values=pixel_values).last_hidden_state.flatten(2).transpose(1, 2)
        tokens = functional.normalize(self.projector(cells).float() - self.middle, dim=-1)
        names = functional.normalize(torch.cat([self.words, self.nothing[None]]), dim=-1)
        with torch.autocast(pixel_values.device.type, enabled=False):  # bf16 is too coarse for cosines
            logits = self.scale.exp() * tokens @ names.T + self.bias
        return {"loss": functional.cross_entropy(logits.flatten(0, 1), labels.flatten(0, 1)), "logits": logits}


def cell_shares(objects: list[tuple[list[str], np.ndarray, Any]], view: View, side: int) -> torch.Tensor:
    """What is in every cell of a view, of shape `(side * side, 81)`: shares of the categories and of nothing, sum 1.

    Args:
        objects (`list[tuple]`): Words, mask and role, as [`~seen.named_objects`] gives them.
    """
    shares = torch.zeros(NOTHING + 1, side, side)
    for words, mask, _ in objects:
        name = " ".join(word for word in words if not is_place(word))
        if name in NUMBERS:
            shown = torch.as_tensor(view.of_mask(mask).copy(), dtype=torch.float32)
            shares[NUMBERS[name]] += functional.adaptive_avg_pool2d(shown[None], side)[0]
    shares[NOTHING] = (1 - shares.sum(0)).clamp(min=0)
    return (shares / shares.sum(0)).flatten(1).T


def random_view(width: int, height: int, dice: random.Random) -> View:
    """A photograph as a whole or a part of it, mirrored or not."""
    sides = (
        [width, height] if dice.random() < WHOLE else [round(n * dice.uniform(SMALLEST, 1)) for n in (width, height)]
    )
    x, y = dice.randint(0, width - sides[0]), dice.randint(0, height - sides[1])
    return View((x, y, x + sides[0], y + sides[1]), dice.random() < 0.5)


class Photographs(torch.utils.data.Dataset):
    """The photographs of a data set of rows, each once; none with a crowd, of which rows do not hold the mask."""

    def __init__(self, rows: Any, image_processor: Any, side: int):
        self.rows, self.image_processor, self.side = rows, image_processor, side
        first: dict[str, int] = {}
        for index, (name, text) in enumerate(zip(rows["image_id"], rows["reasoning"], strict=True)):
            if not is_crowded({"reasoning": text}):
                first.setdefault(name, index)
        self.indices = list(first.values())

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        row = self.rows[self.indices[index]]
        image = to_rgb_image(row["image"])
        seed = int(torch.randint(2**31, ()))  # of the worker, which the trainer seeds anew for every epoch
        view = random_view(*image.size, random.Random(seed))
        pixels = self.image_processor(view.of_image(image), return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixels, "labels": cell_shares(named_objects(row), view, self.side)}


def optimizer_of(model: CellNaming) -> torch.optim.Optimizer:
    encoder = [parameter for parameter in model.encoder.parameters() if parameter.requires_grad]
    known = {id(parameter) for parameter in encoder}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in known]
    groups = [{"params": others}, {"params": encoder, "lr": ENCODER_FACTOR * LEARNING_RATE}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.02)


def train(folder: Path, epochs: float, batch_size: int) -> None:
    """Write `vlm_seeing` beside the folders `vlm` and `rows`; checkpoints are kept in `seeing`."""
    torch.manual_seed(0)
    vlm = AutoModelForImageTextToText.from_pretrained(folder / "vlm")
    processor = AutoProcessor.from_pretrained(folder / "vlm")
    side = round(vlm.config.image_seq_length**0.5)
    photographs = Photographs(load_dataset_of(f"{folder / 'rows'}:train").dataset, processor.image_processor, side)
    words = [processor.tokenizer(f" {name}", add_special_tokens=False).input_ids for name in CATEGORIES]
    model = CellNaming(vlm, words)
    arguments = TrainingArguments(
        output_dir=folder / "seeing",
        num_train_epochs=epochs,
        per_device_train_batch_size=batch_size,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        dataloader_num_workers=1,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=photographs, optimizers=(optimizer_of(model), None))
    last = get_last_checkpoint(arguments.output_dir) if Path(arguments.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=last)
    vlm.save_pretrained(folder / "vlm_seeing")
    processor.save_pretrained(folder / "vlm_seeing")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/photos-small"), help="folder of `vlm` and `rows`")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    train(given.output, given.epochs, given.batch_size)


if __name__ == "__main__":
    main()
