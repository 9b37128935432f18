"""The trainers that stand for a downloaded VLM and SAM: patches -> words, prompts -> masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from labels import ATTRIBUTES, CELLS, patch_labels
from torch import nn
from transformers import Trainer

from segcompass_hf.image_features_segcompass import parts_of
from segcompass_hf.modeling_masks import MaskStage
from segcompass_hf.training.loop.muon import MuonWithAdamW
from segcompass_hf.training.loop.resume import RobustTrainerMixin

ADAMW_RATIO = 0.33  # AdamW's learning rate over Muon's, which is `learning_rate`


class PretrainingTrainer(RobustTrainerMixin, Trainer):
    """Trainer with `MuonWithAdamW` and running means of whatever the loss reports."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sums: dict[str, list[float]] = {}

    def create_optimizer(self, model=None):
        rate = self.args.learning_rate
        named = list((model or self.model).named_parameters())
        groups = [{"named_parameters": named, "muon_lr": rate, "adamw_lr": rate * ADAMW_RATIO}]
        self.optimizer = MuonWithAdamW(groups, weight_decay=self.args.weight_decay)
        return self.optimizer

    def report(self, **values: torch.Tensor | float) -> None:
        """Add to the means that the next log line shows."""
        for name, value in values.items():
            total = self._sums.setdefault(name, [0.0, 0])
            total[0] += float(value.detach() if isinstance(value, torch.Tensor) else value)
            total[1] += 1

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:
            logs = {**logs, **{name: round(total / count, 4) for name, (total, count) in self._sums.items()}}
            self._sums.clear()
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs) -> int:
        return 0


class PatchWords:
    """Loss that lets the image token of every patch point at the words for what the patch shows.

    The logit of a word is `s * <f / rms(f), E_word>` with f the projected patch and E the language model's own input
    embeddings, so that seeing and reading share one space from the start.
    """

    scale = 0.2

    def __init__(self, tokenizer):
        index = tokenizer.convert_tokens_to_ids
        self.words = {name: torch.tensor(index(list(values))) for name, values in ATTRIBUTES.items()}
        self.cells = torch.tensor(index(list(CELLS)))
        self.centre, self.nothing = index("object"), index("none")

    def __call__(self, patches, embeddings, labels, colored=None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`patches` (batch, 64, hidden), `embeddings` (words, hidden), `colored` (batch,) bool: judge color."""
        rms = patches.float().pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()
        target_rms = embeddings.detach().float().pow(2).mean().sqrt()
        direction = patches.float() / rms * embeddings.shape[-1] ** 0.5 * self.scale
        logits = direction @ (embeddings.float() / target_rms).t() / embeddings.shape[-1] ** 0.5  # (batch, 64, words)
        loss = 0.5 * (rms / target_rms).log().pow(2).mean()  # image tokens as long as words: one residual stream
        seen = {}
        for name, words in self.words.items():
            y = labels[name]
            if name == "color" and colored is not None:
                y = torch.where(colored[:, None], y, torch.full_like(y, -100))
            chosen = logits[..., words.to(logits.device)]
            on = y >= 0
            weight = torch.where(labels["centre"], 2.0, 1.0)[on]
            error = F.cross_entropy(chosen[on], y[on], reduction="none")
            loss = loss + (error * weight).sum() / weight.sum().clamp(min=1)
            both = on & labels["centre"]
            seen[f"{name}_accuracy"] = (chosen.argmax(-1) == y)[both].float().mean()
        cells = logits[..., self.cells.to(logits.device)]
        own = torch.arange(cells.shape[1], device=cells.device).expand(cells.shape[:2])
        loss = loss + 0.3 * F.cross_entropy(cells.flatten(0, 1), own.flatten())
        centre = logits[..., self.centre] - 2
        loss = loss + 2 * F.binary_cross_entropy_with_logits(centre, labels["centre"].float())
        nothing = logits[..., self.nothing] - 1
        judged = labels["background"] | (labels["shape"] >= 0)
        loss = loss + 0.3 * F.binary_cross_entropy_with_logits(nothing[judged], labels["background"][judged].float())
        found = centre > 0
        hits = (found & labels["centre"]).sum()
        seen["centre_f1"] = 2 * hits / (found.sum() + labels["centre"].sum()).clamp(min=1)
        return loss, seen


class VisionTrainer(PretrainingTrainer):
    """Stage 1: the vision tower and projector of a LLaVA learn to name patches in the words of its language model.

    Half of the images are shown without color, so that shape is not learned from it.
    """

    def __init__(self, *args, tokenizer, **kwargs):
        super().__init__(*args, **kwargs)
        self.patch_words = PatchWords(tokenizer)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels = inputs["pixel_values"]
        colored = torch.arange(len(pixels), device=pixels.device) % 2 == 0
        gray = pixels.mean(1, keepdim=True).expand_as(pixels)
        sign = torch.where(torch.arange(len(pixels), device=pixels.device) % 4 == 1, 1.0, -1.0)
        gray = gray * sign[:, None, None, None]
        pixels = torch.where(colored[:, None, None, None], pixels, gray)
        features = model.model.vision_tower(pixels).last_hidden_state[:, 1:]
        patches = model.model.multi_modal_projector(features)
        embeddings = model.get_input_embeddings().weight
        labels = patch_labels(inputs["ids"].cpu(), inputs["objects"].cpu())
        labels = {name: value.to(pixels.device) for name, value in labels.items()}
        loss, seen = self.patch_words(patches, embeddings, labels, colored)
        self.report(**seen)
        return (loss, {}) if return_outputs else loss


class MaskTrainer(PretrainingTrainer):
    """Stage 2: a segmenter learns to turn a coarse, noisy blob into the mask of the object it lies on.

    An auxiliary head reads color, shape, size, row and column off the image embedding, so that the embedding holds
    what the slot mapper will look for with plain dot products. The head is `model.auxiliary_head`, dropped afterwards.
    """

    @staticmethod
    def add_auxiliary_head(sam: nn.Module) -> None:
        channels = sam.config.mask_decoder_config.hidden_size
        sam.auxiliary_head = nn.Conv2d(channels, sum(len(v) for v in ATTRIBUTES.values()) + 1, 1)
        sam.place_head = nn.Conv2d(channels, 2 * MaskStage(sam).embedding_size, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, objects = inputs["ids"], inputs["objects"]
        stage = MaskStage(model)
        features = stage.encode_image(inputs["pixel_values"])
        embeddings = parts_of(features)[0].float()  # (batch, channels, 14, 14)
        count = (objects[..., 3] >= 0).sum(-1)
        first = (torch.rand(len(ids), device=ids.device) * count).long()
        step = 1 + (torch.rand(len(ids), device=ids.device) * (count - 1)).long()
        chosen = torch.stack([first, (first + step) % count], dim=1) + 1  # two different objects each
        full = (ids[:, None] == chosen[..., None, None]).float()  # (batch, 2, 112, 112)
        target = F.avg_pool2d(full, 2)  # (batch, 2, 56, 56)
        masks = stage.decode(features, _noisy_blobs(target))
        probability = masks.float().sigmoid()
        inter = (probability * target).sum((-1, -2))
        dice = 1 - (2 * inter + 1) / ((probability + target).sum((-1, -2)) + 1)
        error = F.binary_cross_entropy_with_logits(masks.float(), target, reduction="none")
        focal = (error * (probability - target).abs().pow(2)).mean((-1, -2))
        loss = dice.mean() + 10 * focal.mean() + 0.35 * self._auxiliary(model, embeddings, ids, objects)
        with torch.no_grad():
            hard, truth = F.interpolate(masks.float(), size=ids.shape[1:], mode="bilinear") > 0, full > 0
            iou = (hard & truth).sum((-1, -2)) / (hard | truth).sum((-1, -2)).clamp(min=1)
        self.report(mask_iou=iou.mean(), dice=dice.mean())
        return loss

    def _auxiliary(self, model, embeddings, ids, objects):
        side = embeddings.shape[-1]
        stride = ids.shape[-1] // side
        owner = ids[:, stride // 2 :: stride, stride // 2 :: stride].flatten(1).long()  # (batch, side * side)
        on = owner > 0
        scores = model.auxiliary_head(embeddings).flatten(2).transpose(1, 2)
        loss = F.binary_cross_entropy_with_logits(scores[..., 0], on.float())
        start = 1
        for column, values in enumerate(ATTRIBUTES.values()):
            label = objects[..., column].gather(1, (owner - 1).clamp(min=0))
            loss = loss + F.cross_entropy(scores[..., start : start + len(values)][on], label[on])
            start += len(values)
        place = model.place_head(embeddings).flatten(2).transpose(1, 2)
        index = torch.arange(side * side, device=place.device).expand(len(ids), -1)
        row = F.cross_entropy(place[..., :side].flatten(0, 1), (index // side).flatten())
        column = F.cross_entropy(place[..., side:].flatten(0, 1), (index % side).flatten())
        return loss + 0.5 * (row + column)


def _noisy_blobs(target: torch.Tensor) -> torch.Tensor:
    """Logits (batch, objects, 56, 56) of what an imperfect heatmap of each mask may look like."""
    coarse = F.avg_pool2d(target, 4)
    coarse = coarse + 0.08 * torch.randn_like(coarse)
    wide = 1.8 * F.avg_pool2d(F.pad(coarse, (1, 1, 1, 1)), 3, stride=1)
    mode = torch.rand(*target.shape[:2], 1, 1, device=target.device)
    coarse = torch.where(mode < 0.4, wide, coarse)
    logits = coarse * torch.empty_like(mode).uniform_(4, 9) - torch.empty_like(mode).uniform_(1.5, 3.5)
    return F.interpolate(logits, size=target.shape[-2:], mode="bilinear", align_corners=False)
