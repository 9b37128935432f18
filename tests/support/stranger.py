"""What somebody without the package does with published checkpoints: load in every way, answer, write the answers.

Run as `python stranger.py PLAN.json`; the plan names image, instruction, what to load, and where to write.
"""

import importlib.abc
import json
import sys
from pathlib import Path


class Blocker(importlib.abc.MetaPathFinder):
    """An editable install is on the path whatever PYTHONPATH says."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "segcompass_hf":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)
        return None


sys.meta_path.insert(0, Blocker())
try:
    import segcompass_hf  # noqa: F401
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("segcompass_hf is importable, so this would test nothing")

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    pipeline,
)

torch.set_num_threads(1)
plan = json.loads(Path(sys.argv[1]).read_text())
image, instruction = Image.open(plan["image"]), plan["instruction"]
output, trust = Path(plan["output"]), {"trust_remote_code": True}


def answer(name, model, processor):
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert type(processor).__module__.startswith("transformers_modules."), type(processor)
    inputs = processor(images=image, instruction=instruction)
    result = model.eval().segment(**inputs)
    np.savez(
        output / f"{name}.npz",
        sequences=result.sequences.numpy(),
        **{field: getattr(result, field).float().numpy() for field in ("heatmap_logits", "slot_logits", "pred_masks")},
    )


def load(auto_class, source, **kwargs):
    return auto_class.from_pretrained(source, **trust, **kwargs)


folder, repo, pinned = plan["folder"], plan["repo"], plan["revision"]
processor = load(AutoProcessor, folder)
answer("folder", load(AutoModel, folder), processor)
answer("other auto class", load(AutoModelForImageTextToText, folder), processor)
config = load(AutoConfig, repo, revision=pinned)
assert type(config).__name__ == "SegCompassConfig" and config.num_slots == 4

model = load(AutoModel, repo, revision=pinned)
processor = load(AutoProcessor, repo, revision=pinned)
answer("pinned", model, processor)
answer("main", load(AutoModel, repo), load(AutoProcessor, repo))

again = output / "again"
model.save_pretrained(again)
processor.save_pretrained(again)
answer("saved again", load(AutoModel, str(again)), load(AutoProcessor, str(again)))
sharded = output / "sharded"
load(AutoModel, plan["sharded"]).save_pretrained(sharded, max_shard_size="2MB")
assert len(list(sharded.glob("*.safetensors"))) > 1
answer("sharded", load(AutoModel, str(sharded)), load(AutoProcessor, plan["sharded"]))
answer("adapter", load(AutoModel, plan["adapter"]), load(AutoProcessor, plan["adapter"]))

quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
four_bit = load(AutoModel, folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32)
answer("4 bits", four_bit, processor)

for name, source, extra in (
    ("pipe", repo, {"revision": pinned}),
    ("pipe again", str(again), {}),
    ("pipe adapter", plan["adapter"], {}),
):
    pipe = pipeline("reasoning-segmentation", model=source, device="cpu", **trust, **extra)
    assert type(pipe).__module__.startswith("transformers_modules."), type(pipe)
    result = pipe(image, instruction=instruction)
    masks = {str(segment["slot"]): np.asarray(segment["mask"]) for segment in result["segments"]}
    np.savez(output / f"{name}.npz", reasoning=np.array(result["reasoning"]), **masks)

errors = {}
for name, source, extra in (("private", plan["private"], {}), ("missing", "me/missing", {})):
    try:
        load(AutoModel, source, **extra)
    except OSError as error:
        errors[name] = str(error)
try:
    load(AutoModel, repo, revision="nowhere")
except OSError as error:
    errors["revision"] = str(error)
assert type(load(AutoConfig, plan["private"], token=plan["token"])).__name__ == "SegCompassConfig"
(output / "errors.json").write_text(json.dumps(errors))
(output / "code.json").write_text(json.dumps({name: sorted(path.name for path in Path(name).glob("*.py"))
                                              for name in (str(again), str(sharded))}))  # fmt: skip
