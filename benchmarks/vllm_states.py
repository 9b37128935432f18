"""What vLLM itself gives, beside transformers: states, SAE codes, masks and answers of the same rows of Scenes.

    pip install vllm==0.31.0  # in an environment of its own; see docs/how-to/vllm.md, also for machines without a GPU
    python benchmarks/vllm_states.py                     # the bundled checkpoint, 16 rows
    python benchmarks/vllm_states.py --model FOLDER --rows 64 --dtype bfloat16

Writes benchmarks/results/vllm_states_{cuda,cpu}.{json,md} with the versions. On the CPU vLLM's writer of files is
replaced in one method, which copies by CUDA streams (`vllm_cpu_connector.py`).
"""

import argparse
import json
import os
import platform
import tempfile
from pathlib import Path

import torch
import transformers

from segcompass_hf import SegCompassForReasoningSegmentation, SegCompassProcessor, bundled_checkpoint
from segcompass_hf.data import scenes
from segcompass_hf.data.sequence_states import TransformersStates
from segcompass_hf.data.vllm_states import VllmStates, extraction_settings
from segcompass_hf.evaluation.predictors.model import ModelPredictor
from segcompass_hf.evaluation.predictors.vllm import VllmPredictor
from segcompass_hf.text_stack_segcompass import decoder_layers
from segcompass_hf.training.sae.rows import RowEncoder
from segcompass_hf.training.vllm_folder import export_for_vllm

RESULTS = Path(__file__).parent / "results"
BATCH = 8
CPU_CACHE_BYTES = 256 << 20  # of keys, values and states


def open_states(model, processor, folder: Path, dtype: torch.dtype, max_model_len: int) -> VllmStates:
    """An engine on the model's VLM, on the GPU where there is one."""
    export_for_vllm(model, processor, folder / "vlm")
    layers, storage = [model.config.sae_layer, len(decoder_layers(model.vlm))], folder / "states"
    settings = {"max_model_len": max_model_len, "enforce_eager": True, "max_num_seqs": BATCH}
    if not torch.cuda.is_available():
        os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        transfer = extraction_settings(layers, storage)["kv_transfer_config"]
        transfer |= {"kv_connector": "CpuHiddenStatesConnector", "kv_connector_module_path": "vllm_cpu_connector"}
        settings |= {"kv_transfer_config": transfer, "kv_cache_memory_bytes": CPU_CACHE_BYTES}
    return VllmStates.open(folder / "vlm", processor, layers, storage, dtype, **settings)


@torch.no_grad()
def compare_states(model, processor, source: VllmStates, rows: list[dict]) -> dict[str, float]:
    """Of the tokens of rows with their reference answers: the largest difference, and codes of the SAE."""
    inputs, images = RowEncoder(processor).with_images(list(enumerate(rows)))
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    mask, found = inputs["attention_mask"].bool(), {"tokens": int(inputs["attention_mask"].sum())}
    both = [of.states_of_layers(source.layers, inputs, images) for of in (TransformersStates(model.vlm), source)]
    for layer, theirs, ours in zip(source.layers, *both, strict=True):
        theirs, ours = theirs[mask].float(), ours[mask].float()
        found[f"layer {layer}: largest difference"] = (ours - theirs).abs().max().item()
        found[f"layer {layer}: largest state"] = theirs.abs().max().item()
    modality = model.modality_ids(inputs["input_ids"])[mask]
    layer = source.layers.index(model.config.sae_layer)
    codes = [model.sae(states[layer][mask].to(model.sae.dtype), modality_ids=modality).feature_acts for states in both]
    threshold = model.config.concept_threshold
    found["concepts that fire"] = int((codes[0] >= threshold).sum())
    found["concepts that differ in firing"] = int(((codes[0] >= threshold) != (codes[1] >= threshold)).sum())
    found["largest difference of a code"] = (codes[0] - codes[1]).abs().max().item()
    return found


def compare_answers(model, processor, source: VllmStates, rows: list[dict], max_new_tokens: int) -> dict[str, float]:
    """Of free greedy answers: how many are the same words, and how far the masks of those agree."""
    settings = {"max_new_tokens": max_new_tokens}
    plain = ModelPredictor(model, processor, constrain_format=False, **settings)
    through = VllmPredictor(model, processor, source, **settings)
    same, pixels, differing, scores = 0, 0, 0, [0.0]
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        for one, other in zip(plain.segment(batch)[2], through.segment(batch)[2], strict=True):
            if one["text"] != other["text"] or one["masks"].shape != other["masks"].shape:
                continue
            same += 1
            pixels += one["masks"].numel()
            differing += int((one["masks"] != other["masks"]).sum())
            scores += (one["scores"] - other["scores"]).abs().tolist()
    return {
        "answers": len(rows),
        "same words and number of masks": same,
        "pixels of their masks": pixels,
        "pixels that differ": differing,
        "largest difference of a score": max(scores),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(bundled_checkpoint()))
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--max-new-tokens", type=int, default=160)
    parser.add_argument("--max-model-len", type=int, default=512)
    arguments = parser.parse_args()
    import vllm

    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, arguments.dtype)
    rows = list(scenes.build("val", arguments.rows, seed=0))
    with tempfile.TemporaryDirectory() as folder:
        processor = SegCompassProcessor.from_pretrained(arguments.model)
        model = SegCompassForReasoningSegmentation.from_pretrained(arguments.model, dtype=dtype).eval()
        # The engine first: it may take its memory before the model does.
        source = open_states(model, processor, Path(folder), dtype, arguments.max_model_len)
        model = model.to(device)
        results = {
            "model": Path(arguments.model).name,
            "device": torch.cuda.get_device_name() if device == "cuda" else f"CPU {platform.machine()}",
            "dtype": arguments.dtype,
            "vllm": vllm.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            **compare_states(model, processor, source, rows[:BATCH]),
            **compare_answers(model, processor, source, rows, arguments.max_new_tokens),
        }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"vllm_states_{device}"
    path.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        f"| {name} | {value:.3g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in results.items()
    ]
    table = "\n".join(["# vLLM beside transformers", "", __doc__.splitlines()[0], "", "| | |", "|---|---|", *lines])
    path.with_suffix(".md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
