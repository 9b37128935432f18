# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""The concept dictionary: for every feature of an SAE the words and patches it fires on, and a label derived so."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import nn
from transformers.utils import logging

from ...concept_names_segcompass import NamedConcept
from ...data.readable_rows import keep_images_encoded
from . import store
from .counts import DictionaryCounts
from .entries import MEASURES, SCORES, ConceptEntry, ExampleStore, StoredEntries, columns_of, make_entries
from .families import ConceptFamily, families_of
from .finding import from_cache, newest
from .labels import MIN_PRECISION, derive_labels
from .names import ConceptName, best_name, derive_names
from .objects import NamedObjects, normalize_word, target_objects
from .page import write_page
from .reading import ConceptReader

logger = logging.get_logger(__name__)


class ConceptDictionary:
    """What every feature of an SAE stands for, as far as a data set shows.

    Labels are derived, not given: a label is the word that best predicts where a feature fires, on one half of the
    images; its scores are measured on the other half.

    Example:

    ```python
    >>> dictionary = ConceptDictionary.build(model, processor, rows)  # doctest: +SKIP
    >>> dictionary.search("red")[0].top_patches  # doctest: +SKIP
    >>> dictionary.save("checkpoint")  # doctest: +SKIP
    ```

    Args:
        entries (`Sequence[ConceptEntry]`): One per feature, in order.
        scores (`dict[str, np.ndarray]`): Further numbers `(d_sae,)`: F1 on the half of the images that labels are
            derived from (`derived_f1_words`, `derived_f1_patches`) and of firing at any activation (`any_f1_words`,
            `any_f1_patches`); NaN where not defined.
        pictures (`list[bytes]`): JPEG files that `PatchExample.picture` counts in.
        info (`dict`): Of its making: `d_sae`, `sae_sha256`, `rows`, `words`, `patches`, and the settings.
        sketch (`np.ndarray`): See `sae_sketch`.
    """

    def __init__(
        self,
        entries: Sequence[ConceptEntry],
        scores: dict[str, np.ndarray],
        pictures: list[bytes],
        info: dict[str, Any],
        sketch: np.ndarray,
    ):
        self.entries, self.scores, self.pictures, self.info, self.sketch = entries, scores, pictures, info, sketch
        self._labels, self._purities, self._words = map(self._column, ("label", "purity", "words"))
        self._names = list(map(best_name, names := self._column("names")))
        self._has_names = any(own is not None for own in names)

    def _column(self, name: str) -> list:
        if isinstance(self.entries, StoredEntries):
            return self.entries.column(name)
        return [getattr(entry, name) for entry in self.entries]

    @classmethod
    def build(
        cls,
        model: Any,
        processor: Any,
        rows: Iterable[dict[str, Any]],
        *,
        num_rows: int | None = None,
        batch_size: int = 8,
        use_reference_reasoning: bool = True,
        named_objects: NamedObjects = target_objects,
        all_objects_named: bool = False,
        top_k: int = 8,
        max_pictures: int = 300,
        max_entries: int = 4_000_000,
    ) -> ConceptDictionary:
        """Read rows once, in any number, in bounded memory.

        Args:
            model (`SegCompassForReasoningSegmentation`): Whose SAE is described.
            processor (`SegCompassProcessor`): Of the model.
            rows (`Iterable[dict]`): In the row schema; a data set, a stream or a list.
            num_rows (`int`, *optional*): Read so many at most.
            batch_size (`int`, defaults to 8): Rows of one pass.
            use_reference_reasoning (`bool`, defaults to `True`): Read the reasoning of the rows (where they have
                one), or what the model writes (slower).
            named_objects (`Callable`, defaults to [`target_objects`]): A row -> the words that name an object, and
                its mask, for as many objects as are known; [`scenes_objects`] for Scenes.
            all_objects_named (`bool`, defaults to `False`): Those are all objects of the image, so that patches off
                them are of no word. Otherwise those patches are left out, and since a target may be red without being
                called so, F1 on patches and purity are lower bounds.
            top_k (`int`, defaults to 8): Examples per feature, of words and of patches.
            max_pictures (`int`, defaults to 300): Small pictures kept for the examples; some 3 KB each.
            max_entries (`int`, defaults to 4,000,000): Bound of the tables of (word, feature) and (feature, feature)
                pairs, 16 bytes an entry, five tables; the rarest pairs are forgotten beyond it.

        Raises:
            ValueError: There are no rows, or one cannot be read; the message names the sample.
        """
        reader = ConceptReader(model, processor, named_objects, use_reference_reasoning)
        all_objects_named = all_objects_named and reader.places_known  # else no patch is known to be off them
        counts = DictionaryCounts(model.config.sae_config.d_sae, top_k, all_objects_named, max_entries)
        examples = ExampleStore(counts.top_words, counts.top_patches, with_pictures=max_pictures > 0)
        was_training = model.training
        model.eval()
        try:
            stream = enumerate(itertools.islice(iter(keep_images_encoded(rows)), num_rows))
            while batch := list(itertools.islice(stream, batch_size)):
                for reading in reader.read(batch):
                    counts.add(reading)
                    examples.add(reading)
        finally:
            model.train(was_training)
        settings = {"use_reference_reasoning": use_reference_reasoning, "top_k": top_k}
        return cls.from_counts(counts, examples, model.sae, max_pictures, settings)

    @classmethod
    def from_counts(
        cls,
        counts: DictionaryCounts,
        examples: ExampleStore,
        sae: nn.Module,
        max_pictures: int = 300,
        settings: dict[str, Any] | None = None,
    ) -> ConceptDictionary:
        """Derive a dictionary from counts; see [`~ConceptDictionary.build`].

        Raises:
            ValueError: No row was counted.
        """
        if not sum(counts.rows):
            raise ValueError("there are no rows to build a concept dictionary from.")
        if not all(counts.rows):
            logger.warning(
                f"all {sum(counts.rows)} rows are of one half of the images (split by image_id), so labels are "
                f"{'not derived' if not counts.rows[0] else 'not scored'}; read rows of more images."
            )
        labels = derive_labels(counts)
        entries, pictures = make_entries(counts, examples, labels, derive_names(counts), max_pictures)
        names = ("derived_f1_words", "derived_f1_patches", "any_f1_words", "any_f1_patches")
        info = {
            "d_sae": counts.d_sae,
            "sae_sha256": store.sae_hash(sae),
            "rows": sum(counts.rows),
            "rows_derive": counts.rows[0],
            "rows_score": counts.rows[1],
            "words": counts.units[0],
            "patches": counts.units[1],
            "forgotten": counts.forgotten,
            "all_objects_named": counts.all_objects_named,
            **(settings or {}),
        }
        scores = {name: labels[name].astype(np.float32) for name in names}
        return cls(entries, scores, pictures, info, store.sae_sketch(sae))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, feature: int) -> ConceptEntry:
        return self.entries[self._checked(feature)]

    def _checked(self, feature: int) -> int:
        if not 0 <= feature < len(self):
            raise IndexError(f"feature {feature} was asked for; this SAE has features 0 to {len(self) - 1}.")
        return feature

    def label(self, feature: int) -> str | None:
        """The derived label of a feature; `None` where no word predicts it."""
        return self._labels[self._checked(feature)]

    def purity(self, feature: int) -> float | None:
        """Share of a feature's firings on held-out images that are on its label."""
        return self._purities[self._checked(feature)]

    def name(self, feature: int) -> ConceptName | None:
        """What tells where a feature fires, and does so on held-out images; `None` where nothing does."""
        return self._names[self._checked(feature)]

    def said(self, feature: int) -> tuple[str | None, float | None]:
        """What explanations call a feature, with its purity: its name, or the label in a file without names."""
        name = self.name(feature)
        if name is None:
            return (None, None) if self._has_names else (self.label(feature), self.purity(feature))
        return name.text, name.purity

    def families(self) -> list[ConceptFamily]:
        """Features of one name as one concept, largest families first; those without a name are in none."""
        return families_of(self._names)

    def updated(self, column: Literal["effect", "interpretation"], values: Mapping[int, Any]) -> ConceptDictionary:
        """The same dictionary with what was found out of some features later.

        Args:
            column (`str`): `effect` (see [`measure_effects`]) or `interpretation` (see [`interpret`]).
            values (`Mapping`): By feature; the others keep what they have.
        """
        entries = list(self.entries)
        for feature, value in values.items():
            entries[self._checked(feature)] = replace(entries[feature], **{column: value})
        return ConceptDictionary(entries, self.scores, self.pictures, self.info, self.sketch)

    def search(self, text: str, limit: int = 20) -> list[ConceptEntry]:
        """Features by label, best first, then those that often fire on the word.

        Args:
            text (`str`): A word, in any case and number.
            limit (`int`, defaults to 20): Return so many at most.
        """
        wanted = {text, text.lower(), normalize_word(text)}
        ranked = []
        for feature, (label, words) in enumerate(zip(self._labels, self._words, strict=True)):
            share = max((share for word, share in map(_word_and_share, words) if word in wanted), default=0.0)
            if label in wanted:
                f1 = [self.scores[f"derived_f1_{modality}"][feature] for modality in ("words", "patches")]
                ranked.append((0, -float(np.nansum(f1)), feature))
            elif share >= 0.1:
                ranked.append((1, -share, feature))
        return [self.entries[feature] for *_, feature in sorted(ranked)[:limit]]

    def names(self) -> dict[str, NamedConcept]:
        """What images show, by name, for guardrails: the features whose label predicts patches and holds on them.

        Of the features with a label, those count whose label was derived on patches, and is right on held-out images
        more often than not; each from its threshold on patches.
        """
        shown: dict[str, dict[int, float]] = {}
        columns = map(self._column, ("label", "label_place", "purity", "threshold_patches"))
        for feature, (label, place, purity, threshold) in enumerate(zip(*columns, strict=True)):
            if label is not None and place != "words" and threshold is not None and (purity or 0) >= MIN_PRECISION:
                shown.setdefault(label, {})[feature] = threshold
        return {name: NamedConcept(name, tuple(found), tuple(found.values())) for name, found in shown.items()}

    def check(self, sae: nn.Module) -> None:
        """Raise a `ValueError` unless this is the dictionary of an SAE."""
        store.check_sae(self.info, self.sketch, sae)

    def save(self, folder: str | os.PathLike) -> None:
        """Write `concepts.safetensors` and `concepts.parquet` into a folder, usually the checkpoint's."""
        columns = columns_of(self.entries)
        arrays = {f"scores.{name}": array for name, array in self.scores.items()}
        for name in (*SCORES, *MEASURES):
            arrays[name] = np.array([np.nan if v is None else v for v in columns[name]], np.float32)
        arrays["sae_sketch"] = self.sketch
        arrays["pictures"] = np.frombuffer(b"".join(self.pictures), np.uint8)
        arrays["picture_ends"] = np.cumsum([len(picture) for picture in self.pictures], dtype=np.int64)
        store.write_files(folder, arrays, columns, self.info, self.names().values())

    @classmethod
    def load(cls, folder: str | os.PathLike, model: Any = None) -> ConceptDictionary:
        """Read a dictionary from a folder.

        Args:
            folder (`str` or `os.PathLike`): Holds both files.
            model (*optional*): A model; a dictionary of another SAE than its own is refused.

        Raises:
            FileNotFoundError: The folder holds none, or half of one.
            ValueError: The files are damaged, do not belong together, or are of another SAE.
        """
        arrays, table, info = store.read_files(folder)
        ends = arrays["picture_ends"].tolist()
        data = arrays["pictures"].tobytes()
        pictures = [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        scores = {name[7:]: array for name, array in arrays.items() if name.startswith("scores.")}
        dictionary = cls(StoredEntries(table), scores, pictures, info, arrays["sae_sketch"])
        if model is not None:
            dictionary.check(model.sae)
        return dictionary

    @classmethod
    def from_pretrained(
        cls, path_or_hub_id: str | os.PathLike, revision: str | None = None, model: Any = None, **kwargs: Any
    ) -> ConceptDictionary:
        """Read a dictionary from a checkpoint's folder or from the Hub.

        Args:
            path_or_hub_id (`str` or `os.PathLike`): A folder, or a repository.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            model (*optional*): See [`~ConceptDictionary.load`].
            kwargs: What `transformers.utils.cached_file` takes (`token`, `cache_dir`, `local_files_only`).

        Raises:
            OSError: There is no dictionary.
            ValueError: See [`~ConceptDictionary.load`].
        """
        if os.path.isdir(path_or_hub_id):
            return cls.load(path_or_hub_id, model)
        from transformers.utils import cached_file

        files = [
            cached_file(os.fspath(path_or_hub_id), name, revision=revision, **kwargs)
            for name in (store.NUMBERS_FILE, store.TABLE_FILE)
        ]
        return cls.load(Path(files[0]).parent, model)

    @classmethod
    def find(cls, model_or_path: Any) -> ConceptDictionary | None:
        """The dictionary that lies beside a checkpoint, if there is a usable one.

        Args:
            model_or_path: A model (where it was loaded from is looked at) or a folder.

        Returns:
            `ConceptDictionary`, or `None` where there is none. One that is damaged or of another SAE is left out with
            a warning.
        """
        is_path = isinstance(model_or_path, (str, os.PathLike))
        model = None if is_path else model_or_path
        folder = model_or_path if is_path else getattr(model_or_path.config, "_name_or_path", "")
        try:
            if not folder:
                return None
            if os.path.isdir(folder):
                return newest(cls, Path(folder), model)
            return None if is_path else from_cache(cls, folder, model)
        except (OSError, ValueError, ImportError) as error:
            logger.warning(f"concepts stay without labels: {error}")
            return None

    def to_html(self, path: str | os.PathLike, max_features: int = 2000) -> None:
        """Write a page to browse: search, examples, pictures; one file that needs no network.

        Args:
            path (`str` or `os.PathLike`): The file.
            max_features (`int`, defaults to 2000): Features shown, labelled ones first, then by density; those that
                never fired are left out.
        """
        write_page(self, path, max_features)


def _word_and_share(word: Any) -> tuple[str, float]:
    """Of an entry, or as it is stored."""
    return (word["word"], word["share"]) if isinstance(word, dict) else word


__all__ = ["ConceptDictionary", "ConceptEntry", "target_objects"]
