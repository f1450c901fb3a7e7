"""The HTML report: facts and cards into one self-contained page.

Everything that the page shows is in the file: pictures as data URIs, style and script inline.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from cache.places import place
from cache.store import Store
from pipeline.config.reading import yaml_text
from pipeline.data.base import DataSet
from pipeline.looking import facts, scores
from pipeline.looking.confusion import READABLE
from pipeline.looking.facts import Run
from pipeline.looking.figures import Figure
from pipeline.looking.gallery import Card
from pipeline.looking.panels import (
    ERROR_PALETTE,
    ERRORS,
    OTHER_WRONG,
    RIGHT,
    UNLABELLED,
    data_uri,
    encoded,
    hex_colour,
    object_palette,
)
from pipeline.looking.tagged import percent_palette
from pipeline.running.manifests import found_manifest
from pipeline.running.table import IN_CACHE, labels_stage

TEMPLATES = Path(__file__).parent / "templates"
MAX_PICTURES = 10_000_000  # bytes of all pictures before base64; the page stays below 15 MB
SIDES = (512, 384, 256, 192, 128, 96)  # the largest at which the pictures fit
SHOWN_ERRORS = range(RIGHT + 1, len(ERRORS))
CLOSED_ERRORS = (OTHER_WRONG, UNLABELLED)  # where nothing is unseen


def render(
    runs: Sequence[Run],
    store: Store,
    data: DataSet,
    cards: Sequence[Card],
    *,
    figures: Sequence[Figure] = (),
    about: Sequence[str] = (),
    is_spread: bool = True,
) -> str:
    """The page of a run as far as it has got, or of several, of which the first owns store and training cards.

    `about` are lines on what is shown and what is missing; is_spread: images were not asked for by name or class.
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters |= {"bytes": facts.human_bytes, "seconds": facts.human_seconds}
    environment.filters["score"] = lambda value: "–" if value is None else f"{value:.1f}"
    first, shown = runs[0], _encoded(cards, data)
    config, metrics = first.config, first.metrics
    labels = (found_manifest(config, labels_stage(config)) or {}).get("summary")
    return environment.get_template("report.html.j2").render(
        name=config.name,
        runs=runs,
        data=data,
        config=config,
        config_yaml=yaml_text(config.model_dump(mode="json", by_alias=True)),
        about=about,
        score_names=scores.SCORES if data.unseen else {"pAcc": "pAcc", "mIoU_S": "mIoU"},
        is_spread=is_spread,
        metrics=metrics,
        sisters=facts.sisters(config) if metrics and len(runs) == 1 else [],
        galleries=[
            ("test", "Test images", [card for card in shown if card["part"] == "test"]),
            ("train", "Training images", [card for card in shown if card["part"] == "train"]),
        ],
        names=_names(data),
        errors=[(ERRORS[i], hex_colour(ERROR_PALETTE[i])) for i in (SHOWN_ERRORS if data.unseen else CLOSED_ERRORS)],
        percent=[hex_colour(colour) for colour in percent_palette()[::10]],
        per_class=scores.per_class(runs, data),
        confusions=scores.confusions(runs, data),
        order=[data.classes[i] for i in (*data.seen_ids, *data.unseen_ids)],
        readable=READABLE,
        gamma_charts=scores.gamma_charts(runs),
        loss_charts=scores.loss_charts(runs),
        time_shares=[(run, scores.time_shares(run)) for run in runs],
        cluster=labels if config.recipe == "clip_teacher" else None,
        cams=labels if config.recipe == "clip_es" else None,
        figures=[(figure, data_uri("image/png", figure.png)) for figure in figures],
        objects_chart=scores.objects_chart(config),
        arrays=facts.array_facts(config, store),
        sizes=store.sizes,
        stages=_stages(runs, store),
        quarantined=facts.quarantined(config),
        provenance=facts.provenance(store) | _made(runs),
    )


def _stages(runs: Sequence[Run], store: Store) -> list[tuple[Run, facts.StageFact]]:
    """The stages of all runs; those of one cache once."""
    found, caches = list[tuple[Run, facts.StageFact]](), set[str]()
    for run in runs:
        where = str(place(run.config.cache_path).resolve())
        own = store if run is runs[0] else Store.open(run.config.cache_path)
        stages = facts.stage_facts(run.config, own, run.metrics)
        found += [(run, stage) for stage in stages if where not in caches or stage.name not in IN_CACHE]
        caches.add(where)
    return found


def _made(runs: Sequence[Run]) -> dict[str, dict[str, str]]:
    """When, on what and from which code each run was evaluated."""
    found = {}
    for run in runs:
        metrics = run.metrics or {}
        said = {key: str(value) for key, value in metrics.get("made", {}).items()}
        if said:
            said["fingerprint"] = metrics.get("fingerprint", "")
            found[f"evaluation {run.letter}".rstrip()] = said
    return found


def _encoded(cards: Sequence[Card], data: DataSet) -> list[dict[str, Any]]:
    """Cards with their pictures as data URIs, at the largest side at which all of them fit."""
    num_photos = sum(panel.kind == "photo" for card in cards for panel in card.panels)
    for side in SIDES:
        most = int(0.6 * MAX_PICTURES / max(num_photos, 1))
        files = [[encoded(panel, side, most) for panel in card.panels] for card in cards]
        if sum(len(content) for row in files for _, content in row) <= MAX_PICTURES:
            break
    unseen = set(data.unseen_ids)
    shown = []
    for order, (card, row) in enumerate(zip(cards, files, strict=True)):
        height, width = card.panels[0].pixels.shape[:2] if card.panels else (1, 1)
        panels = [
            {"title": p.title, "kind": p.kind, "under": p.under} | {"uri": data_uri(*file), "size": p.pixels.shape[:2]}
            for p, file in zip(card.panels, row, strict=True)
        ]
        rest = {name: getattr(card, name) for name in ("id", "part", "notes", "accuracy", "iou", "rivals")}
        lead = None if card.iou is None or not card.rivals else card.iou - max(iou for _, iou in card.rivals)
        shown.append(
            rest
            | {"order": order, "ratio": round(width / height, 4), "objects": card.num_objects, "panels": panels}
            | {"lead": lead}  # points of IoU by which the first run is ahead of the best of the others
            | {"legend": [(i, data.classes[i], hex_colour(data.palette[i]), i in unseen) for i in card.classes]}
            | {"has_unseen": bool(unseen & set(card.classes if card.truth is None else card.truth))}
        )
    return shown


def _names(data: DataSet) -> dict[str, dict[str, str]]:
    """What a colour means, by kind of map: what the page says of the pixel under the pointer."""
    classes: dict[str, str] = {}
    for i, name in enumerate(data.classes):
        key = hex_colour(data.palette[i])
        named = f"{name} (unseen)" if i in data.unseen_ids else name
        classes[key] = f"{classes[key]} or {named}" if key in classes else named
    objects = {hex_colour(object_palette()[i]): f"potential object {i}" for i in range(1, 255)}
    objects[hex_colour(object_palette()[255])] = "padding"
    errors = {hex_colour(ERROR_PALETTE[i]): word for i, word in enumerate(ERRORS) if i}
    percent = {hex_colour(colour): f"{share} %" for share, colour in enumerate(percent_palette())}
    return {"classes": classes, "objects": objects, "errors": errors, "percent": percent}
