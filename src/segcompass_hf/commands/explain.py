# Copyright 2026 The segcompass_hf authors. Licensed under the Apache License, Version 2.0.
"""`segcompass explain`: one image and instruction to the concepts behind every mask, as a page, a figure or JSON; with
`--controls` a data set to what such explanations are worth."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from ..checkpoint import default_checkpoint
from .common import (
    FIGURES,
    UserError,
    add_question,
    ask,
    check_question,
    load_checkpoint,
    make_folder,
    need_figures,
    positive,
    print_page,
    user_errors,
)

_PAGES = (".html", ".htm")


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "explain", help="one image and instruction to the concepts behind every mask, as a page without network"
    )
    add_question(parser, required=False)
    parser.add_argument(
        "--output",
        type=Path,
        help="page (.html) or figure (.png, .jpg, .pdf, .svg) to write (IMAGE.segcompass.html here; with --json none "
        "unless given); with --controls the folder of the results",
    )
    parser.add_argument("--json", action="store_true", help="print the explanation as JSON, masks as run lengths")
    parser.add_argument(
        "--target",
        choices=("mask_logit", "mask_contrast", "slot_logit"),
        default="mask_logit",
        help="what to explain: the mean logit inside the mask, that less the mean outside, or the slot's confidence "
        "(%(default)s)",
    )
    parser.add_argument(
        "--num-ablations",
        type=_count,
        default=5,
        metavar="N",
        help="concepts of every mask to take away as a test (%(default)s)",
    )
    parser.add_argument(
        "--max-concepts", type=positive, default=50, metavar="N", help="concepts to list of a mask (%(default)s)"
    )
    parser.add_argument("--dictionary", type=Path, help="folder of a concept dictionary (the checkpoint's own)")
    _add_controls(parser.add_argument_group("controls", "what explanations of a model are worth, on a data set"))
    parser.set_defaults(run=run)


def _add_controls(group: Any) -> None:
    group.add_argument(
        "--controls",
        action="store_true",
        help="hold explanations against ablations of equal norm, unions, causal patches and changed reasoning; takes "
        "--dataset and --output in place of image and instruction; the same command continues what a kill interrupted",
    )
    group.add_argument("--dataset", help="as in `segcompass evaluate`, such as scenes:val:7")
    group.add_argument("--num-samples", type=positive, help="only the first so many (all; of Scenes 500)")
    group.add_argument("--random-sae", metavar="MODEL", help="checkpoint trained alike with a frozen random SAE")
    group.add_argument("--reseeded-sae", metavar="MODEL", help="checkpoint trained alike with an SAE of another seed")
    group.add_argument(
        "--objects",
        metavar="MODULE:FUNCTION",
        help="row -> (words, mask) of every known object; the target's by default, on Scenes all objects",
    )


def run(args: argparse.Namespace) -> None:
    """Explain what the command line names."""
    if args.controls:
        _run_controls(args)
        return
    if args.image is None or args.instruction is None:
        raise UserError("image and instruction are missing; or ask for --controls with --dataset and --output.")
    check_question(args, (*_PAGES, *FIGURES), f"neither a page (.html) nor a picture ({', '.join(FIGURES)})")
    if args.output is not None and args.output.suffix.lower() in FIGURES:
        need_figures()
    dictionary = None if args.dictionary is None else _load_dictionary(args.dictionary)
    image, model, processor, name = ask(args)
    explanation = _explain(args, model, processor, image, dictionary)
    explanation.model_name = name
    output = args.output
    if output is None and not args.json:
        output = Path(f"{Path(args.image).stem}.segcompass.html")
    if output is not None:
        _write(explanation, output)
    if args.json:
        print(json.dumps(explanation.to_dict() | {"file": None if output is None else str(output)}, indent=1))
        return
    _print(explanation)
    if output.suffix.lower() in _PAGES:
        print_page(output)
    else:
        print(f"figure: {output}")


def _run_controls(args: argparse.Namespace) -> None:
    import datasets

    from ..evaluation import datasets_spec
    from ..explain.controls.running import OTHERS, run_controls

    if args.image is not None or args.dataset is None or args.output is None:
        raise UserError("--controls takes --dataset and --output FOLDER, and neither image nor instruction.")
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    with user_errors(args.dataset):
        named = datasets_spec.load_dataset_of(args.dataset, args.num_samples)
        objects = _objects(args.objects, named.kind)
    model, processor, name = load_checkpoint(args.model or default_checkpoint(args.dataset))
    make_folder(args.output)
    rows = named.dataset.select(range(min(len(named.dataset), args.num_samples or len(named.dataset))))

    def report(of: str, number: int) -> None:
        print(f"\r{of}: {number}/{len(rows)}", end="", file=sys.stderr, flush=True)

    with user_errors():
        run_controls(
            model,
            processor,
            rows,
            args.output,
            objects,
            title=f"{name} on {named.name}",
            command=f"segcompass {shlex.join(args.argv)}",
            others={other: getattr(args, other) for other in OTHERS if getattr(args, other) is not None},
            report=report if sys.stderr.isatty() else lambda of, number: None,
        )
    text = args.output / ("controls.json" if args.json else "controls.md")
    print(text.read_text("utf-8"))


def _objects(spec: str | None, kind: str) -> Any:
    """What names the objects of a row."""
    if spec is None:
        spec = f"segcompass_hf.explain:{'scenes_objects' if kind == 'scenes' else 'target_objects'}"
    module, _, name = spec.partition(":")
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--objects {spec}: expected MODULE:FUNCTION that can be imported: {error}") from error


def _explain(args: argparse.Namespace, model: Any, processor: Any, image: Any, dictionary: Any) -> Any:
    from ..explain import explain

    with user_errors():
        return explain(
            model,
            processor,
            image,
            args.instruction,
            target=args.target,
            num_ablations=args.num_ablations,
            max_concepts=args.max_concepts,
            reasoning=args.reasoning,
            dictionary=dictionary,
        )


def _load_dictionary(folder: Path) -> Any:
    from ..explain.dictionary.dictionary import ConceptDictionary

    with user_errors(f"cannot read a concept dictionary from {folder}"):
        return ConceptDictionary.load(folder)


def _write(explanation: Any, output: Path) -> None:
    from ..figure import write_figure

    make_folder(output.parent)
    with user_errors(f"cannot write {output}"):
        if output.suffix.lower() in _PAGES:
            explanation.to_html(output)
        else:
            write_figure(explanation.plot(), output)


def _print(explanation: Any) -> None:
    from ..explain import group_concepts

    print(f"reasoning: {explanation.reasoning or '(none)'}")
    if not any(mask.kept for mask in explanation.masks):
        print(f"nothing found (best slot {max(explanation.slot_scores, default=0.0):.2f})")
    for number, mask in enumerate(explanation.masks):
        title = f"slot {mask.slot}" if mask.kept else f"slot {mask.slot}, not kept"
        print(f"{title}: score {mask.score:.2f}, {int(mask.mask.sum())} pixels, {mask.num_concepts} active concepts")
        for family in group_concepts(mask.concepts)[:5]:
            part = f"{100 * family.share:+7.1f} %" if mask.in_shares else f"{family.contribution:+9.2f}"
            members = ", ".join(str(concept.feature) for concept in family.concepts[:5])
            members += ", ..." if len(family.concepts) > 5 else ""
            name = f"  {family.name}" if family.name else ""
            kind = "concept" if len(family.concepts) == 1 else "concepts"
            print(f"  {part}  {kind} {members}{name}{_without(family, number)}")


def _without(family: Any, number: int) -> str:
    """What the mask of this number becomes without the first concept of a family, if that was tried."""
    first = family.concepts[0]
    which = "it" if len(family.concepts) == 1 else first.feature
    return "" if first.ablation is None else f"  (without {which} IoU {first.ablation.iou[number]:.2f})"


def _count(text: str) -> int:
    """A number of the command line, 0 or more."""
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)
