"""MobileSAM without the package, alone and in a composition; run as `python mobile_sam_stranger.py FOLDER [SOURCE]`.

SOURCE (FOLDER when left out) holds both, or is the owner of both on the Hub. FOLDER has `inputs.pt`; what they answer
goes to `answers.pt`.
"""

import sys
from pathlib import Path

sys.modules["segcompass_hf"] = None  # importing it fails

import torch  # noqa: E402
from transformers import AutoModel, AutoProcessor  # noqa: E402

torch.set_num_threads(1)
folder, source, trust = Path(sys.argv[1]), sys.argv[-1], {"trust_remote_code": True}
inputs = torch.load(folder / "inputs.pt")
model = AutoModel.from_pretrained(f"{source}/composition", **trust)
assert type(AutoProcessor.from_pretrained(f"{source}/composition", **trust)).__name__ == "SegCompassProcessor"
alone = AutoModel.from_pretrained(f"{source}/mobile_sam", **trust)
for sam in (model.sam, alone):
    assert type(sam).__name__ == "MobileSamModel" and type(sam).__module__.startswith("transformers_modules."), sam
answers = {
    "composition": model.segment(**inputs, max_new_tokens=8).pred_masks,
    "alone": alone.get_image_embeddings(inputs["sam_pixel_values"]),
}
torch.save(answers, folder / "answers.pt")
