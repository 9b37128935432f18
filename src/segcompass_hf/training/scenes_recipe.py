"""How scenes-tiny is made: seven stages from random weights, each resumable, on two CPU cores or one GPU."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, SamModel, TrainingArguments, set_seed
from transformers.utils import logging

from ..modeling_sae import SegCompassSae
from ..modeling_segcompass import SegCompassForReasoningSegmentation
from ..processing_segcompass import SegCompassProcessor
from .loop.checkpoints import find_last_whole
from .loop.muon import has_fast_bfloat16
from .sae.start import THRESHOLD_TOKENS, fit_thresholds_, spread_directions_
from .scenes_batches import SceneCollator, SceneSamples
from .scenes_concepts import harvest_pairs
from .scenes_joint import JointCollator, JointTrainer
from .scenes_parts import build_processor, build_sae_config, build_sam, build_tokenizer, build_vlm
from .scenes_sae import SceneSaeTrainer, StateDataset, harvest, sae_report
from .scenes_slots import SlotTrainer
from .scenes_trainers import MaskTrainer, VisionTrainer, WarmupTrainer

logger = logging.get_logger(__name__)

SAE_LAYER = 2  # of 4


@dataclass(frozen=True)
class Stage:
    """Settings of one stage. `learning_rate` is Muon's; each stage draws its own stream of scenes, `seed`.

    `kinds` restricts the instructions (`None`: all kinds), but for every `any_kind_every`-th scene. `options` change
    what the stage builds: of `warmup` and `words` the weights of their losses (`concept_weight` makes concepts shared
    by words and patches); of `sae` the fields of `SegCompassSaeConfig`, `layer` among them, and the pair loss of
    `SceneSaeTrainer`; of `slots` those of `SegCompassConfig`, such as `num_slots` (objects beyond them are united) and
    `concept_threshold`.
    """

    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    kinds: tuple[str, ...] | None = None
    any_kind_every: int | None = None
    options: dict[str, Any] | None = None


STAGES = {
    "vision": Stage(steps=700, batch_size=64, learning_rate=6e-3, seed=0),
    "masks": Stage(steps=1000, batch_size=16, learning_rate=6e-3, seed=1),
    "warmup": Stage(steps=4500, batch_size=32, learning_rate=3e-3, seed=2),
    "words": Stage(
        steps=1500,
        batch_size=32,
        learning_rate=2e-3,
        seed=21,
        options={"concept_weight": 0.3, "concept_scale": 8.0},  # words and patches share concepts
    ),
    "sae": Stage(
        steps=2500,
        batch_size=2048,
        learning_rate=2e-3,
        seed=3,
        options={"pair_loss": "shared_topk", "pair_weight": 0.5},  # a word and its patches, one set of features
    ),
    "slots": Stage(steps=1000, batch_size=32, learning_rate=6e-3, seed=5),
    "joint": Stage(steps=800, batch_size=32, learning_rate=4e-3, seed=4),
}
SAE_SCENES = 3000  # whose tokens the SAE is trained on
PAIR_SCENES = 600  # whose words and patches it is taught to give the same features, with `pair_loss`
PAIRING = ("pair_loss", "pair_weight", "pair_k")
SLOT_SETTINGS = {
    "num_slots": 4,
    "d_slot": 128,
    "slot_encoder_heads": 4,
    "concept_threshold": 0.25,
    "max_reasoning_tokens": 128,
    "short_reasoning_tokens": 16,
    "lm_loss_weight": 0.5,
    "conf_loss_weight": 1.0,
    "match_confidence_weight": 1.0,  # with 0.3 slots go on taking each other's objects, and none gets confident
    "heatmap_bce_weight": 5.0,
    "heatmap_dice_weight": 2.0,
    "mask_dice_weight": 1.0,
    "mask_focal_weight": 5.0,
}

LOG = "log.jsonl"  # written last: a stage that has it is finished

# Each stage writes its result to a folder of its name; what it starts from:
NEEDS = {
    "vision": (),
    "masks": (),
    "warmup": ("vision",),
    "words": ("warmup",),
    "sae": ("warmup",),  # from `words` where that has been run
    "slots": ("warmup", "sae", "masks"),
    "joint": ("slots",),
}


def _language_model(output_dir: Path) -> Path:
    """Folder of the VLM that later stages start from."""
    return output_dir / ("words" if (output_dir / "words" / LOG).exists() else "warmup")


def _scenes(stage: Stage) -> SceneSamples:
    """The stream of scenes of a stage."""
    count = stage.steps * stage.batch_size
    return SceneSamples(count, seed=stage.seed, kinds=stage.kinds, any_kind_every=stage.any_kind_every)


def _arguments(name: str, stage: Stage, folder: Path, logging_steps: int = 50) -> TrainingArguments:
    on_gpu, processes = torch.cuda.is_available(), int(os.environ.get("WORLD_SIZE", 1))
    return TrainingArguments(
        output_dir=str(folder / "state"),
        max_steps=stage.steps,
        per_device_train_batch_size=stage.batch_size // processes,
        learning_rate=stage.learning_rate,
        weight_decay=0.02,
        warmup_steps=min(40, stage.steps // 10),
        lr_scheduler_type="warmup_stable_decay",
        lr_scheduler_kwargs={"num_decay_steps": int(0.6 * stage.steps), "min_lr_ratio": 0.02},
        max_grad_norm=1.0,
        bf16=name != "sae" and has_fast_bfloat16(),
        use_cpu=not on_gpu,
        logging_steps=logging_steps,
        save_steps=max(1, min(500, stage.steps // 4)),
        save_total_limit=1,
        report_to=[],
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_num_workers=0 if name == "sae" else 8 if on_gpu else 1,
        seed=stage.seed,
    )


def run_stage(name: str, output_dir: str | Path, stage: Stage | None = None) -> Path:
    """Run one stage, from its last checkpoint where there is one; do nothing where its result is there.

    Args:
        name (`str`): one of `STAGES`.
        output_dir (`str`): holds one folder per stage; those that the stage starts from must be there.
        stage (`Stage`, *optional*): other settings than the recipe's.

    Returns:
        `Path`: the stage's folder: weights, and the logged curve in `log.jsonl`.

    Raises:
        FileNotFoundError: a stage that this one starts from has not been run.
        ValueError: `words` after `sae`.
    """
    output_dir = Path(output_dir)
    folder, stage = output_dir / name, stage or STAGES[name]
    if (folder / LOG).exists():
        return folder
    for needed in NEEDS[name]:
        if not (output_dir / needed / LOG).exists():
            raise FileNotFoundError(f"stage {name!r} starts from {needed!r}, which has no result in {output_dir}.")
    if name == "words" and (output_dir / "sae" / LOG).exists():
        raise ValueError(f"{output_dir} has an SAE of other states already; stage 'words' comes before 'sae'.")
    set_seed(stage.seed)
    model, trainer = _BUILDERS[name](output_dir, stage, _arguments(name, stage, folder))
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))
    if trainer.is_world_process_zero():
        _finish(name, model, folder)
        log = folder / f"{LOG}.tmp"
        log.write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))
        log.replace(folder / LOG)
    trainer.accelerator.wait_for_everyone()
    return folder


def last_checkpoint(folder: Path) -> str | None:
    """The last whole checkpoint of a stage; `None` where there is none, so that it starts anew."""
    try:
        return str(find_last_whole(folder / "state"))
    except ValueError as error:
        if any((folder / "state").glob("checkpoint-*")):
            logger.warning(f"{folder.name} starts anew: {error}")
        return None


def _vision(output_dir: Path, stage: Stage, arguments: TrainingArguments):
    tokenizer = build_tokenizer()
    vlm = build_vlm(tokenizer)
    vlm.model.language_model.layers.requires_grad_(False)
    data = _scenes(stage)
    return vlm, VisionTrainer(
        model=vlm, args=arguments, train_dataset=data, data_collator=SceneCollator(), tokenizer=tokenizer
    )


def _masks(output_dir: Path, stage: Stage, arguments: TrainingArguments):
    sam = build_sam()
    MaskTrainer.add_auxiliary_head(sam)
    data = _scenes(stage)
    return sam, MaskTrainer(model=sam, args=arguments, train_dataset=data, data_collator=SceneCollator())


def _warmup(output_dir: Path, stage: Stage, arguments: TrainingArguments, start: str = "vision"):
    tokenizer = build_tokenizer()
    # Eager attention: twice as fast here as the fused kernel, whose backward is slow on CPUs at this size.
    vlm = AutoModelForImageTextToText.from_pretrained(
        output_dir / start, dtype=torch.float32, attn_implementation="eager"
    )
    data = _scenes(stage)
    return vlm, WarmupTrainer(
        model=vlm,
        args=arguments,
        train_dataset=data,
        data_collator=SceneCollator(tokenizer),
        tokenizer=tokenizer,
        sae_layer=SAE_LAYER,
        part_learning_rates={"model.vision_tower": 0.5},
        **(stage.options or {}),
    )


def _sae(output_dir: Path, stage: Stage, arguments: TrainingArguments):
    tokenizer = build_tokenizer()
    vlm = AutoModelForImageTextToText.from_pretrained(_language_model(output_dir), dtype=torch.float32)
    vlm.to(arguments.device)
    options = {"layer": SAE_LAYER} | (stage.options or {})
    pairing = {name: options.pop(name) for name in PAIRING if name in options}
    layer, settings = options["layer"], {"seed": stage.seed, "kinds": stage.kinds}
    states, ids = harvest(vlm, tokenizer, layer, SAE_SCENES, **settings)
    modality_ids = (ids == vlm.config.image_token_id).long()
    if pairing:
        pairing["pairs"] = harvest_pairs(vlm, tokenizer, layer, min(PAIR_SCENES, SAE_SCENES), **settings)
    sae = SegCompassSae(build_sae_config(**options))
    if sae.config.normalize_activations == "per_modality":
        sae.fit_modality_statistics_(states, modality_ids)
    with torch.no_grad():
        sae.b_dec.copy_(sae.normalize(states, modality_ids)[0].mean(0))
    if sae.config.architecture == "jumprelu" and sae.config.k is not None:  # `k` only says where thresholds start
        sample = slice(THRESHOLD_TOKENS)
        spread_directions_(sae, stage.seed, encoder_norm=1.0)
        fit_thresholds_(sae, sae.normalize(states[sample], modality_ids[sample])[0], sae.config.k)
    return sae, SceneSaeTrainer(
        model=sae,
        args=arguments,
        train_dataset=StateDataset(states, modality_ids),
        data_collator=lambda rows: rows,
        **pairing,
    )


def _slots(output_dir: Path, stage: Stage, arguments: TrainingArguments):
    settings = SLOT_SETTINGS | (stage.options or {})
    processor = build_processor(settings["num_slots"])
    model = SegCompassForReasoningSegmentation.from_pretrained_parts(
        AutoModelForImageTextToText.from_pretrained(
            _language_model(output_dir), dtype=torch.float32, attn_implementation="eager"
        ),
        SamModel.from_pretrained(output_dir / "masks", dtype=torch.float32),
        SegCompassSae.from_pretrained(output_dir / "sae", dtype=torch.float32),
        tokenizer=processor.tokenizer,
        **settings,
    )
    # A concept starts as what it writes into the state, so that embeddings begin with the geometry of the states.
    with torch.no_grad():
        model.codebook.weight.copy_(model.sae.W_dec)
    SlotTrainer.add_head(model)
    data = _scenes(stage)
    return model, SlotTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=SceneCollator(processor.tokenizer, model.config.num_slots),
        adamw_ratio=0.5,
    )


def _joint(output_dir: Path, stage: Stage, arguments: TrainingArguments):
    model = SegCompassForReasoningSegmentation.from_pretrained(output_dir / "slots", dtype=torch.float32)
    model.vlm.set_attn_implementation("eager")
    model.freeze_for_training()
    data = _scenes(stage)
    return model, JointTrainer(
        model=model,
        args=arguments,
        train_dataset=data,
        data_collator=JointCollator(build_tokenizer(), model.config.num_slots),
        part_learning_rates={"vlm": 0.2, "sam": 0.1},
        adamw_ratio=0.5,
    )


_BUILDERS = {
    "vision": _vision,
    "masks": _masks,
    "warmup": _warmup,
    "words": partial(_warmup, start="warmup"),
    "sae": _sae,
    "slots": _slots,
    "joint": _joint,
}


def split_checkpoint(
    checkpoint: str | Path, output_dir: str | Path, stages: Iterable[str] = ("warmup", "masks")
) -> None:
    """Lay the parts of a finished checkpoint down as results of earlier stages, to train the later ones again.

    Args:
        checkpoint (`str`): a checkpoint such as `bundled_checkpoint()`; its SAE must read the recipe's layer.
        output_dir (`str`): of `run_stage`; stages that have a result there are left alone.
        stages (`Iterable[str]`): of `warmup`, `words` (both its VLM), `masks` (its SAM) and `sae`.

    Raises:
        ValueError: an unknown stage, or `output_dir` holds parts of another checkpoint.
    """
    unknown = set(stages) - {"warmup", "words", "masks", "sae"}
    if unknown:
        raise ValueError(f"a checkpoint holds no {sorted(unknown)}; its parts are warmup, words, masks and sae.")
    digest = hashlib.sha256((Path(checkpoint) / "model.safetensors").read_bytes()).hexdigest()
    source = json.dumps({"part_of": Path(checkpoint).name, "sha256": digest}) + "\n"
    logs = {name: Path(output_dir) / name / LOG for name in stages}
    for log in logs.values():
        if log.exists() and "part_of" in log.read_text() and log.read_text() != source:
            raise ValueError(f"{log.parent} is part of another checkpoint; choose another folder or remove it.")
    if all(log.exists() for log in logs.values()):
        return
    model = SegCompassForReasoningSegmentation.from_pretrained(checkpoint, dtype=torch.float32)
    parts = {"warmup": model.vlm, "words": model.vlm, "masks": model.sam, "sae": model.sae}
    for name, log in logs.items():
        if not log.exists():
            parts[name].save_pretrained(log.parent, save_original_format=False)  # the stages' own names
            log.write_text(source)


def export_checkpoint(output_dir: str | Path, destination: str | Path | None = None) -> Path:
    """Write the result of the last stage as a checkpoint of fp16 weights that loads in float32.

    Args:
        output_dir (`str`): of `run_stage`.
        destination (`str`, *optional*): the folder to write; the bundled checkpoint of this package when left out.
    """
    folder = Path(destination or Path(__file__).parents[1] / "checkpoints" / "scenes-tiny")
    model = SegCompassForReasoningSegmentation.from_pretrained(Path(output_dir) / "joint", dtype=torch.float32)
    SegCompassProcessor.from_pretrained(Path(output_dir) / "joint").save_pretrained(folder)
    model.to(torch.float16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    for code in folder.glob("*.py"):  # remote code is for checkpoints that travel without the package
        code.unlink()
    config = json.loads((folder / "config.json").read_text())
    _tidy(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return folder


def _tidy(config: dict) -> None:
    """fp16 saves space on disk only, CPUs are slow in it; where the parts came from is nobody's path but ours."""
    config.pop("_name_or_path", None)
    if "dtype" in config:
        config["dtype"] = "float32"
    for value in config.values():
        if isinstance(value, dict):
            _tidy(value)


def _finish(name: str, model: nn.Module, folder: Path) -> None:
    """Save a stage's result without what only its training needed."""
    if name == "masks":
        del model.auxiliary_head, model.place_head
    if name == "slots":
        del model.slot_words
    if name == "sae" and not model.takes_top_k:  # which features are the largest would change
        model.fold_decoder_norms_()
    if name == "joint":
        build_processor(model.config.num_slots).save_pretrained(folder)
    model.save_pretrained(folder)


__all__ = ["NEEDS", "STAGES", "Stage", "export_checkpoint", "run_stage", "sae_report", "split_checkpoint"]
