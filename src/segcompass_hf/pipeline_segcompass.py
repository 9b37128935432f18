# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`pipeline("reasoning-segmentation")`: an image and an instruction to reasoning and scored masks."""

from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from transformers.pipelines import Pipeline

from .images_segcompass import to_rgb_image

THRESHOLDS = ("slot_logit_threshold", "mask_logit_threshold", "duplicate_iou_threshold")


class ReasoningSegmentationPipeline(Pipeline):
    r"""Segments what an instruction asks for, and says why.

    ```python
    pipe = pipeline("reasoning-segmentation", model=path)
    pipe(image, instruction="the mug that is easiest to reach")
    pipe([{"image": first, "instruction": "..."}, {"image": second, "instruction": "..."}], batch_size=2)
    ```

    Each answer is a dictionary: `reasoning` (`str`) and `segments`, a list with, per mask kept, `score` (`float` in
    [0, 1]: of a calibrated checkpoint how likely the mask is right), `label` (`str`, the instruction that the mask
    answers), `mask` (`PIL.Image.Image` of mode `L` at the image's own size, 255 inside) and `slot` (`int`). No segment
    means that nothing in the image was found to fit; no two segments show the same object.

    Images are `PIL` images, arrays, paths or URLs. A batch gives the same answers as its samples one by one.
    """

    _load_processor = True
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, inputs: Any, instruction: str | list[str] | None = None, **kwargs) -> Any:
        r"""Segment one image or several.

        Args:
            inputs (image, `dict`, or a list, generator or `datasets.Dataset` of them):
                An image, or `{"image": ..., "instruction": ...}`.
            instruction (`str` or `list[str]`, *optional*): What to find; one for all images, or one per image. Not
                needed where every input brings its own.
            batch_size (`int`, *optional*, defaults to 1): Samples that go through the model together.
            reasoning (`str`, *optional*): `full`, `short` or `none`; see `segment`.
            max_new_tokens (`int`, *optional*): Limit of the generated text in tokens.
            interventions (*optional*): See `segment`.
            slot_logit_threshold (`float`, *optional*): Slots above it are kept; the model's own by default.
            mask_logit_threshold (`float`, *optional*): Pixels above it are inside; the model's own by default.
            duplicate_iou_threshold (`float`, *optional*): A mask whose IoU with a better one reaches it is the same
                object and left out, above 1 none; the model's own by default.
            generate_kwargs (`dict`, *optional*): Anything else for `segment`, for example `{"do_sample": True}`.

        Returns:
            `dict`, or a list of them: see the class.
        """
        if isinstance(instruction, (list, tuple)):
            images = inputs if isinstance(inputs, (list, tuple)) else [inputs]
            if len(images) != len(instruction):
                raise ValueError(
                    f"got {len(images)} images and {len(instruction)} instructions; pass one instruction for all "
                    "images, or as many as there are images."
                )
            inputs = [{"image": image, "instruction": text} for image, text in zip(images, instruction, strict=True)]
            instruction = None
        if type(inputs).__module__.partition(".")[0] == "datasets":
            inputs = (row for row in inputs)  # rows hold image and instruction; answers come as they are iterated
        if isinstance(inputs, (list, tuple)) and len(inputs) == 0:
            return []
        return super().__call__(inputs, instruction=instruction, **kwargs)

    def _sanitize_parameters(self, instruction=None, generate_kwargs=None, **parameters):
        preprocess = {} if instruction is None else {"instruction": instruction}
        forward = dict(generate_kwargs or {})
        postprocess = {}
        for name, value in parameters.items():
            if name in THRESHOLDS:
                postprocess[name] = value
            elif name in ("reasoning", "max_new_tokens", "interventions"):
                forward[name] = value
            else:
                raise TypeError(
                    f"reasoning-segmentation does not take {name!r}; put options of `segment` into generate_kwargs."
                )
        return preprocess, forward, postprocess

    def preprocess(self, inputs: Any, instruction: str | None = None) -> dict[str, Any]:
        """Load one sample. The processor runs on the whole batch in `_forward`: how samples are joined (left padding,
        flattened patches) differs between VLM families, and the processor knows."""
        image = inputs
        if isinstance(inputs, dict):
            if "image" not in inputs:
                raise ValueError(
                    f'an input needs the key "image"; got {sorted(inputs)}. '
                    'Pass {"image": ..., "instruction": ...} or an image with instruction="...".'
                )
            image = inputs["image"]
            instruction = inputs.get("instruction", instruction)
        if not isinstance(instruction, str) or not instruction.strip():
            raise ValueError(
                f"an instruction is a non-empty string; got {instruction!r}. "
                'Pass instruction="..." or {"image": ..., "instruction": ...}.'
            )
        return {"image": to_rgb_image(image), "instruction": instruction}

    def _forward(self, samples: dict[str, Any], **generate_kwargs) -> dict[str, Any]:
        batched = isinstance(samples["instruction"], list)
        images = samples["image"] if batched else [samples["image"]]
        instructions = samples["instruction"] if batched else [samples["instruction"]]
        inputs = self.processor(images=images, instruction=instructions, return_tensors="pt").to(self.device)
        segmentation = self.model.segment(**inputs, **generate_kwargs)
        if len(segmentation.slot_logits) != len(images):
            raise ValueError(
                f"num_return_sequences gives {len(segmentation.slot_logits)} answers for {len(images)} images, the "
                "pipeline returns one each; call model.segment for several."
            )
        thresholds = {name: torch.full((len(images),), float(getattr(segmentation, name))) for name in THRESHOLDS}
        # Flat tensors and lists with one entry per sample: what `Pipeline` can take apart again.
        return {
            "sequences": segmentation.sequences,  # (batch_size, sequence_length)
            "completion_mask": getattr(segmentation, "completion_mask", None),  # (batch_size, sequence_length)
            "slot_logits": segmentation.slot_logits.float(),  # (batch_size, num_slots)
            "slot_scores": segmentation.slot_scores,  # (batch_size, num_slots)
            "heatmap_logits": segmentation.heatmap_logits.float(),  # (batch_size, num_slots, height, width)
            "pred_masks": segmentation.pred_masks.float(),  # (batch_size, num_slots, height, width)
            "original_sizes": inputs["original_sizes"],  # (batch_size, 2)
            "reshaped_input_sizes": inputs["reshaped_input_sizes"],  # (batch_size, 2)
            **thresholds,  # (batch_size,)
            "instruction": instructions,
        }

    def postprocess(
        self,
        outputs: dict[str, Any],
        **thresholds: float | None,
    ) -> dict[str, Any]:
        """Turn one sample's tensors into reasoning and segments."""
        instruction = outputs.pop("instruction")
        instruction = instruction[0] if isinstance(instruction, list) else instruction
        for name in THRESHOLDS:
            outputs[name] = outputs[name].item()
        result = self.processor.post_process_segmentation(
            SimpleNamespace(**outputs),
            original_sizes=outputs["original_sizes"],
            reshaped_input_sizes=outputs["reshaped_input_sizes"],
            output_heatmaps=False,
            **thresholds,
        )[0]
        segments = [
            {
                "score": float(score),
                "label": instruction,
                "mask": Image.fromarray(torch.as_tensor(mask).to(torch.uint8).mul(255).numpy(), mode="L"),
                "slot": int(slot),
            }
            for score, mask, slot in zip(result["scores"], result["masks"], result["slots"], strict=True)
        ]
        return {"reasoning": result["reasoning"], "segments": segments}

    def save_pretrained(self, save_directory: str, **kwargs) -> None:
        """Save model, processor and this file, loadable with `trust_remote_code=True` where the package is missing."""
        # The parts of the processor would be written on their own, and over the processor's files.
        parts = self.tokenizer, self.image_processor
        self.tokenizer = self.image_processor = None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.tokenizer, self.image_processor = parts
        self.processor.save_pretrained(save_directory)


__all__ = ["ReasoningSegmentationPipeline"]
