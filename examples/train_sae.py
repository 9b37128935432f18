"""Pre-train a sparse autoencoder on the hidden states of a VLM. On the bundled checkpoint and Scenes, on CPU:

    python examples/train_sae.py --output_dir runs/sae --use_cpu --normalize_activations per_token --d_sae 1024 \
        --learning_rate 2e-3 --per_device_train_batch_size 1024 --buffer_tokens 16384 --max_steps 500

With any VLM and any image-text data set of the Hub, in the row schema or interleaved, on many GPUs:

    accelerate launch examples/train_sae.py --output_dir runs/sae --bf16 --vlm llava-hf/llava-1.5-7b-hf \
        --dataset HuggingFaceM4/OBELICS --streaming --max_length 2048 --train_tokens 200000000 --eval_strategy steps

The same command goes on from the last whole checkpoint. All settings: `--help`; `--config FILE.yaml` takes them from a
file, which flags override.
"""

from dataclasses import dataclass, field
from typing import Literal

from transformers import AutoModelForImageTextToText, AutoProcessor

import segcompass_hf  # registers SegCompass with the Auto classes
from segcompass_hf.evaluation.processes import Processes
from segcompass_hf.stopping import run_script
from segcompass_hf.training import SaeTrainer, SaeTrainingConfig
from segcompass_hf.training.arguments import read_arguments


@dataclass
class DataArguments:
    vlm: str | None = field(
        default=None, metadata={"help": "Id or folder of a VLM or SegCompass; bundled if not given."}
    )
    dataset: str | None = field(default=None, metadata={"help": "Id or folder of a data set; Scenes if not given."})
    dataset_config: str | None = field(default=None, metadata={"help": "Name of its configuration."})
    split: str = field(default="train", metadata={"help": "Split to read."})
    streaming: bool = field(default=False, metadata={"help": "Read the data set as a stream."})
    num_scenes: int = field(default=1000, metadata={"help": "Scenes to make when no data set is given."})
    vlm_dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "What the VLM is loaded in; auto: as it is stored."}
    )
    export_sae_lens: str | None = field(default=None, metadata={"help": "Folder for a copy in SAELens's format."})


def main():
    data, args = read_arguments(DataArguments, SaeTrainingConfig)
    source = data.vlm or segcompass_hf.bundled_checkpoint()
    vlm = AutoModelForImageTextToText.from_pretrained(source, dtype=data.vlm_dtype)
    processor = AutoProcessor.from_pretrained(source)
    if data.dataset is None:
        rows = segcompass_hf.data.scenes.build(data.split, data.num_scenes)
    else:
        from datasets import load_dataset

        rows = load_dataset(data.dataset, data.dataset_config, split=data.split, streaming=data.streaming)
    trainer = SaeTrainer(vlm, args, rows, processing_class=processor)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    if args.validation_share:
        metrics = trainer.evaluate()
        if args.should_save:
            print("\n".join(f"{name:32} {value:.4f}" for name, value in metrics.items()))
    if data.export_sae_lens and args.should_save:
        from segcompass_hf.training.sae.sae_lens import save_sae_lens

        save_sae_lens(trainer.accelerator.unwrap_model(trainer.model), data.export_sae_lens, vlm=data.vlm)
    Processes.current().finish()


if __name__ == "__main__":
    run_script(main)
