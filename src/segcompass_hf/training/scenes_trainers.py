"""The pre-training stages of scenes-tiny on transformers' Trainer: patches -> words, prompts -> masks, warm-up."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer

from ..modeling_masks import positional_embeddings
from .loop.muon import MuonWithAdamW
from .scenes_batches import ATTRIBUTES, CELLS, patch_labels
from .scenes_concepts import ConceptWords


class RecipeTrainer(Trainer):
    """Trainer with `MuonWithAdamW`, per-part learning rates and running means of whatever the loss reports.

    Args:
        part_learning_rates (`dict[str, float]`): prefix of parameter names -> factor on both learning rates; the first
            prefix that fits counts, the others have factor 1.
        adamw_ratio (`float`): AdamW's learning rate as a fraction of Muon's (`args.learning_rate`).
    """

    def __init__(
        self, *args, part_learning_rates: dict[str, float] | None = None, adamw_ratio: float = 0.33, **kwargs
    ):
        super().__init__(*args, **kwargs)
        # In the original format a LLaVA has other names on disk; resuming (strict=False) would drop them in silence.
        self.model.save_pretrained = partial(self.model.save_pretrained, save_original_format=False)
        self.part_learning_rates = part_learning_rates or {}
        self.adamw_ratio = adamw_ratio
        self._sums: dict[str, list[float]] = {}

    def create_optimizer(self, model=None):
        model = model if model is not None else self.model
        groups: dict[str, list] = {}
        for name, parameter in model.named_parameters():
            prefix = next((p for p in self.part_learning_rates if name.startswith(p)), "")
            groups.setdefault(prefix, []).append((name, parameter))
        rate = self.args.learning_rate
        self.optimizer = MuonWithAdamW(
            (
                {"named_parameters": named, "muon_lr": rate * factor, "adamw_lr": rate * factor * self.adamw_ratio}
                for prefix, named in groups.items()
                for factor in [self.part_learning_rates.get(prefix, 1.0)]
            ),
            weight_decay=self.args.weight_decay,
        )
        return self.optimizer

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        stored = load_file(f"{resume_from_checkpoint}/model.safetensors")
        missing = [name for name in stored if name not in self.model.state_dict()]
        if missing:
            raise ValueError(
                f"{resume_from_checkpoint} holds {len(missing)} weights under names this model does not have, such as "
                f"{missing[0]}; delete the folder to train the stage from its start."
            )
        super()._load_from_checkpoint(resume_from_checkpoint, model)

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


class VisionTrainer(RecipeTrainer):
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


class AnswerWords:
    """Loss that lets the state of a place, where the answer names it, point at the number before it.

    What the slots read is the state at the SAE layer. Left alone, the first layers hardly tell the place that is the
    answer from the same place among the candidates, and a sparse code of them even less; slots then find nothing to
    attend to.
    """

    scale = 4.0

    def __init__(self, tokenizer, num_slots: int = 4):
        index = tokenizer.convert_tokens_to_ids
        self.cells = torch.tensor(index(list(CELLS)))
        self.classes = torch.tensor(index(["no", *(str(n + 1) for n in range(num_slots))]))

    def __call__(self, states, input_ids, embeddings) -> tuple[torch.Tensor, torch.Tensor]:
        """`states` (batch, tokens, hidden) at the SAE layer; returns the loss and the accuracy on answers."""
        cells, classes = self.cells.to(input_ids.device), self.classes.to(input_ids.device)
        is_cell = torch.isin(input_ids, cells)
        is_cell[:, 0] = False
        rows, columns = is_cell.nonzero(as_tuple=True)
        before = input_ids[rows, columns - 1]
        match = before[:, None] == classes[1:]  # only an answer has a number before a place
        label = torch.where(match.any(1), match.long().argmax(1) + 1, torch.zeros_like(before))
        direction = F.normalize(states[rows, columns].float(), dim=-1) * self.scale
        words = F.normalize(embeddings[classes].float(), dim=-1) * self.scale
        logits = direction @ words.t()
        right = (logits.argmax(-1) == label)[label > 0].float().mean()
        return F.cross_entropy(logits, label), right


class WarmupTrainer(RecipeTrainer):
    """Stage 3: language loss on the reference completions.

    Beside it the patch words keep image and word spaces together, and the answer words mark answers at the SAE layer.
    With a `concept_weight` the concept words make patches and words alike there.
    """

    def __init__(
        self,
        *args,
        tokenizer,
        sae_layer: int,
        patch_weight: float = 0.2,
        answer_weight: float = 0.2,
        concept_weight: float = 0.0,
        concept_scale: float = 4.0,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.patch_words, self.patch_weight = PatchWords(tokenizer), patch_weight
        self.answer_words, self.answer_weight = AnswerWords(tokenizer), answer_weight
        self.concept_words, self.concept_weight = ConceptWords(tokenizer, concept_scale), concept_weight
        self.sae_layer = sae_layer
        self._cell_ids = self.patch_words.cells
        self._features: list[torch.Tensor] = []
        self.model.model.multi_modal_projector.register_forward_hook(lambda _, __, out: self._features.append(out))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._features.clear()
        names = ("input_ids", "attention_mask", "pixel_values")
        output = model(**{name: inputs[name] for name in names}, output_hidden_states=True, use_cache=False)
        states, logits = output.hidden_states[self.sae_layer], output.logits
        target = inputs["labels"][:, 1:]
        on = target != -100
        target, logits = target[on], logits[:, :-1][on].float()
        loss = F.cross_entropy(logits, target)
        right = logits.argmax(-1) == target
        is_cell = torch.isin(target, self._cell_ids.to(target.device))
        self.report(language_loss=loss, token_accuracy=right.float().mean())
        self.report(cell_accuracy=right[is_cell].float().mean())
        labels = patch_labels(inputs["ids"].cpu(), inputs["objects"].cpu())
        labels = {name: value.to(loss.device) for name, value in labels.items()}
        patches = self._features[0]  # (batch, 64, hidden)
        embeddings = self.model.get_input_embeddings().weight
        patch_loss, seen = self.patch_words(patches, embeddings, labels)
        answer_loss, answer_accuracy = self.answer_words(states, inputs["input_ids"], embeddings)
        self.report(**seen, answer_accuracy=answer_accuracy)
        loss = loss + self.patch_weight * patch_loss + self.answer_weight * answer_loss
        if self.concept_weight:
            concept_loss, seen = self.concept_words(states, inputs["input_ids"], embeddings, labels)
            self.report(**seen, concept_loss=concept_loss)
            loss = loss + self.concept_weight * concept_loss
        return loss


class MaskTrainer(RecipeTrainer):
    """Stage 2: a SAM learns to turn a coarse, noisy blob into the mask of the object it lies on.

    An auxiliary head reads color, shape, size, row and column off the image embedding, so that the embedding holds
    what the slot mapper will look for with plain dot products. The head is `model.auxiliary_head`, dropped afterwards.
    """

    @staticmethod
    def add_auxiliary_head(sam: nn.Module) -> None:
        channels = sam.config.vision_config.output_channels
        sam.auxiliary_head = nn.Conv2d(channels, sum(len(v) for v in ATTRIBUTES.values()) + 1, 1)
        side = sam.config.vision_config.image_size // sam.config.vision_config.patch_size
        sam.place_head = nn.Conv2d(channels, 2 * side, 1)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, objects = inputs["ids"], inputs["objects"]
        embeddings = model.vision_encoder(inputs["pixel_values"]).last_hidden_state  # (batch, channels, 14, 14)
        count = (objects[..., 3] >= 0).sum(-1)
        first = (torch.rand(len(ids), device=ids.device) * count).long()
        step = 1 + (torch.rand(len(ids), device=ids.device) * (count - 1)).long()
        chosen = torch.stack([first, (first + step) % count], dim=1) + 1  # two different objects each
        full = (ids[:, None] == chosen[..., None, None]).float()  # (batch, 2, 112, 112)
        target = F.avg_pool2d(full, 2)  # (batch, 2, 56, 56)
        masks = self._decode(model, embeddings, _noisy_blobs(target))
        probability = masks.float().sigmoid()
        inter = (probability * target).sum((-1, -2))
        dice = 1 - (2 * inter + 1) / ((probability + target).sum((-1, -2)) + 1)
        error = F.binary_cross_entropy_with_logits(masks.float(), target, reduction="none")
        focal = (error * (probability - target).abs().pow(2)).mean((-1, -2))
        loss = dice.mean() + 10 * focal.mean() + 0.35 * self._auxiliary(model, embeddings.float(), ids, objects)
        with torch.no_grad():
            hard, truth = F.interpolate(masks.float(), size=ids.shape[1:], mode="bilinear") > 0, full > 0
            iou = (hard & truth).sum((-1, -2)) / (hard | truth).sum((-1, -2)).clamp(min=1)
        self.report(mask_iou=iou.mean(), dice=dice.mean())
        return loss

    @staticmethod
    def _decode(model, embeddings, prompts):
        batch, objects = prompts.shape[:2]
        repeated = embeddings.repeat_interleave(objects, 0)
        sparse, dense = model.prompt_encoder(None, None, None, prompts.flatten(0, 1)[:, None])
        position = positional_embeddings(model).repeat(batch * objects, 1, 1, 1)
        masks = model.mask_decoder(
            image_embeddings=repeated,
            image_positional_embeddings=position,
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0]
        return masks.view(batch, objects, *masks.shape[-2:])

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
