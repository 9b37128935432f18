# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""Reference reasoning for rows that have none: the model's own, as it is before training."""

from __future__ import annotations

import os
from typing import Any

from transformers.utils import logging

from ...data.readable_rows import RowCheck, UnreadableLog, check_row
from ...data.schema import decode_mask, decode_masks, row_features
from ...evaluation.pass_at_k import read_prompts
from ...metrics import score_sample

logger = logging.get_logger(__name__)

MOST_WORDINGS = 4  # of a row: easy rows, which are right whatever is sampled, would outnumber the others


def with_own_reasoning(dataset: Any, predictor: Any, batch_size: int = 8, min_iou: float = 0.0) -> Any:
    """Fill `reasoning` where it is missing with what the model itself thinks about the row.

    Without it such rows train masks behind an empty think block, which is not what the model sees when it is used: its
    own answers then get worse. Rows on which it is wrong are what there is to learn, and they stay. Where reasoning is
    worth keeping, `min_iou` leaves them out: masks behind reasoning that points elsewhere teach the model to ignore
    its reasoning (rejection sampling, as in Zelikman et al. 2022, arXiv 2203.14465).

    Args:
        dataset (`datasets.Dataset`): In the row schema; without a `reasoning` column no row has any.
        predictor ([`ModelPredictor`]): Of the model before training. Answers greedily.
        batch_size (`int`, *optional*, defaults to 8): Rows at a time.
        min_iou (`float`, *optional*, defaults to 0.0): Of the model's answer with the row's masks, unions compared, in
            [0, 1]; rows below it that had no reasoning are left out. 0 keeps every row.

    Returns:
        `datasets.Dataset`: the rows that had reasoning and those that got the model's own, in their order, with images
        as they were. Rows that cannot be read are named in warnings and left out.

    Raises:
        ValueError: no row is left.
    """
    if "reasoning" not in dataset.column_names:
        dataset = dataset.add_column("reasoning", [None] * len(dataset), feature=row_features()["reasoning"])
    reasonings = list(dataset["reasoning"])
    missing = [index for index, words in enumerate(reasonings) if not (words or "").strip()]
    if not missing:
        return dataset
    wrong, damaged, log = set(), set(), UnreadableLog(None, "own reasoning")
    check_text = getattr(predictor, "check_row", None)
    for start in logging.tqdm(range(0, len(missing), batch_size), desc="own reasoning"):
        indices = missing[start : start + batch_size]
        rows = {index: row for index in indices if (row := _readable(dataset, index, log, check_text)) is not None}
        damaged |= set(indices) - set(rows)
        predictions = predictor.predict(list(rows.values())) if rows else []
        for (index, row), prediction in zip(rows.items(), predictions, strict=True):
            reasonings[index] = prediction.reasoning
            if _iou(row, prediction) < min_iou:
                wrong.add(index)
    logger.warning(
        f"{len(missing)} of {len(dataset)} rows have no reasoning: {len(missing) - len(wrong | damaged)} got the "
        f"model's own, {len(wrong)} are left out because it led to other masks (IoU below {min_iou}), "
        f"{len(damaged)} because their image, masks or text cannot be read."
    )
    if len(damaged) == len(dataset):
        raise ValueError("no row's image and masks can be read; the reasons are in the warnings before.")
    left_out = wrong | damaged
    if len(left_out) == len(dataset):
        raise ValueError(
            f"the model's own reasoning led to other masks in every row (IoU below {min_iou}); lower min_iou to train "
            "on them all the same, add a `reasoning` column, or start from a model that knows such images."
        )
    feature = dataset.features["reasoning"]
    columns = dataset.column_names
    filled = (
        dataset.remove_columns("reasoning")
        .add_column("reasoning", reasonings, feature=feature)
        .select_columns(columns)
    )
    return filled.select([index for index in range(len(dataset)) if index not in left_out]) if left_out else filled


def with_right_samples(dataset: Any, folder: str | os.PathLike) -> Any:
    """Fill `reasoning` where it is missing with the model's own that led to the right objects: expert iteration.

    Answers are sampled and judged by `segcompass evaluate --pass-at-k` on the same rows; the model that gave them is
    then trained on the right ones (RAFT, Dong et al. 2023, arXiv 2304.06767). It is what reinforcement has to beat.

    Args:
        dataset (`datasets.Dataset`): In the row schema, with `sample_id`.
        folder (`str` or `os.PathLike`): What the command wrote.

    Returns:
        `datasets.Dataset`: the rows that had reasoning, and of each row that had none one copy for every wording of a
        right answer, `MOST_WORDINGS` at most; rows that were never answered right are left out. Images as they were.

    Raises:
        ValueError: The folder holds no samples, or none that is right of any of the rows.
    """
    found = {record["sample_id"]: record["right_reasoning"] for record in read_prompts(folder)}
    if "reasoning" not in dataset.column_names:
        dataset = dataset.add_column("reasoning", [None] * len(dataset), feature=row_features()["reasoning"])
    places: list[int] = []
    reasonings: list[str] = []
    never = unknown = 0
    for place, (sample_id, own) in enumerate(zip(dataset["sample_id"], dataset["reasoning"], strict=True)):
        wordings = [own] if (own or "").strip() else found.get(sample_id, [])[:MOST_WORDINGS]
        places += [place] * len(wordings)
        reasonings += wordings
        unknown += sample_id not in found and not wordings
        never += sample_id in found and not wordings
    logger.warning(
        f"{len(set(places))} of {len(dataset)} rows give {len(places)} answers to train on; {never} are left out for "
        f"they were never answered right, {unknown} for they were not asked in {os.fspath(folder)}."
    )
    if not places:
        raise ValueError(
            f"no row has reasoning or a right answer in {os.fspath(folder)!r} ({never} never right, {unknown} not "
            "asked); sample the rows that are trained on, or start from a model that knows some of the answers."
        )
    columns, feature = dataset.column_names, dataset.features["reasoning"]
    chosen = dataset.select(places).remove_columns("reasoning")
    return chosen.add_column("reasoning", reasonings, feature=feature).select_columns(columns)


def _readable(dataset: Any, index: int, log: UnreadableLog, check_text: RowCheck | None) -> dict[str, Any] | None:
    try:
        row = dataset[index]
        check_row(row)
        if check_text is not None:
            check_text(row)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise about anything
        sample_id = dataset.select_columns(["sample_id"])[index]["sample_id"]
        log.add(index, sample_id, f"{type(error).__name__}: {error}", "left out")
        return None
    return row


def _iou(row: dict[str, Any], prediction: Any) -> float:
    size = row["image"].size[::-1]
    ignore = None if row.get("ignore") is None else decode_mask(row["ignore"])
    return score_sample(prediction.masks, decode_masks(row["masks"], size), ignore).iou
