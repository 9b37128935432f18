# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint of the original code, in its own files: the parity fixtures' weights and a SAM image encoder."""

import json
from pathlib import Path

import torch
from parity import under
from places import FIXTURES
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig

SAM_FIXTURE = FIXTURES / "sam_image_encoder.safetensors"
SAM_HEADS = {"mask_decoder_config": {"num_attention_heads": 4}}  # the fixtures' decoder has 4, every published one 8


def sam_pixels() -> torch.Tensor:
    """What the fixture's image encoder was run on: waves, `(1, 3, 256, 256)`."""
    i = torch.arange(256.0)
    waves = [torch.sin(i[:, None] * (0.05 + 0.02 * c) + i[None] * (0.11 - 0.03 * c) + c) for c in range(3)]
    return torch.stack(waves)[None]


def write_original(folder: Path, core: dict[str, torch.Tensor], description: dict, shards: int = 1) -> Path:
    """Write `refseg_modules.pt`, `llm_hf` (in `shards` files) and `sam_vit.pth`.

    Args:
        core, description: The `core` parity fixture.
    """
    llm_folder = folder / "llm_hf"
    llm_folder.mkdir(parents=True)
    LlavaConfig(**description["config"]["llava"]).save_pretrained(llm_folder)
    llm = {name: tensor.contiguous() for name, tensor in under(core, "llm.").items()}
    if shards == 1:
        save_file(llm, llm_folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(llm)
        files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        for index, file in enumerate(files):
            save_file({name: llm[name] for name in names[index::shards]}, llm_folder / file, metadata={"format": "pt"})
        weight_map = {name: files[index % shards] for index, name in enumerate(names)}
        index = {"metadata": {}, "weight_map": weight_map}
        (llm_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    side = under(core, "refseg.")
    torch.save(side, folder / "refseg_modules.pt")
    published = under({k: v + 1 for k, v in core.items()}, "refseg.")  # SAM before training: must not be read
    sam = {name: v for name, v in published.items() if name.startswith(("prompt_encoder.", "mask_decoder."))}
    encoder = {name: v for name, v in load_file(SAM_FIXTURE).items() if name.startswith("image_encoder.")}
    torch.save(sam | encoder, folder / "sam_vit.pth")
    return folder
