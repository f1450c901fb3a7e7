"""The HTML report: facts and cards into one self-contained page.

Everything that the page shows is in the file: pictures as data URIs, style and script inline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cache.store import Store
from pipeline.config import LABELS_FROM, Config
from pipeline.data.base import DataSet
from pipeline.looking import charts, facts
from pipeline.looking.gallery import Card
from pipeline.looking.panels import (
    ERROR_PALETTE,
    ERRORS,
    OTHER_WRONG,
    RIGHT,
    UNLABELLED,
    data_uri,
    encoded,
    object_palette,
)
from pipeline.looking.tagged import percent_palette
from pipeline.tracking import found_manifest

TEMPLATES = Path(__file__).parent / "templates"
MAX_PICTURES = 10_000_000  # bytes of all pictures before base64; the page stays below 15 MB
SIDES = (512, 384, 256, 192, 128, 96)  # the largest at which the pictures fit
SCORES = {"pAcc": "pAcc", "mIoU_S": "mIoU(S)", "mIoU_U": "mIoU(U)", "hIoU": "hIoU"}
LOSS_TERMS = {
    "total": "total",
    "global": "global (GLM)",
    "generate": "generate (VLA)",
    "ce": "cross-entropy",
    "focal": "focal",
    "dice": "dice",
    "lr": "learning rate",
    "potential": "potential objects a batch",
}
SHOWN_ERRORS = range(RIGHT + 1, len(ERRORS))
CLOSED_ERRORS = (OTHER_WRONG, UNLABELLED)  # where nothing is unseen
TAKEN_FOR = 4  # most frequent predictions listed for an unseen class


def render(
    config: Config,
    store: Store,
    data: DataSet,
    cards: Sequence[Card],
    *,
    metrics: Mapping[str, Any] | None,
    about: Sequence[str] = (),
) -> str:
    """The page of a run as far as it has got; `about` are lines on what is shown and what is missing."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bytes": facts.human_bytes, "seconds": facts.human_seconds, "score": _score}
    shown = _encoded(cards, data)
    labels = (found_manifest(config, LABELS_FROM[config.recipe]) or {}).get("summary")
    return environment.get_template("report.html.j2").render(
        name=config.name,
        data=data,
        config=config,
        config_yaml=yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False),
        about=about,
        score_names=SCORES,
        metrics=metrics,
        sisters=facts.sisters(config) if metrics else [],
        galleries=[
            ("test", "Test images", [card for card in shown if card["part"] == "test"]),
            ("train", "Training images", [card for card in shown if card["part"] == "train"]),
        ],
        names=_names(data),
        errors=[
            (ERRORS[i], _hex(ERROR_PALETTE[i])) for i in (SHOWN_ERRORS if data.unseen else CLOSED_ERRORS)
        ],
        percent=[_hex(colour) for colour in percent_palette()[::10]],
        per_class=_per_class(metrics, data),
        taken_for=_taken_for(config, metrics, data),
        gamma_chart=_gamma_chart(metrics),
        loss_charts=_loss_charts(config),
        time_shares=_time_shares(config),
        cluster=labels if config.recipe == "clip_teacher" else None,
        cams=labels if config.recipe == "clip_es" else None,
        objects_chart=_objects_chart(config),
        arrays=facts.array_facts(config, store),
        sizes=store.sizes,
        stages=facts.stage_facts(config, store, metrics),
        quarantined=facts.quarantined(config),
        provenance=facts.provenance(store),
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _hex(colour: np.ndarray) -> str:
    return "#" + "".join(f"{int(value):02x}" for value in colour)


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
            {
                "title": p.title,
                "kind": p.kind,
                "under": p.under,
                "uri": data_uri(*file),
                "size": p.pixels.shape[:2],
            }
            for p, file in zip(card.panels, row, strict=True)
        ]
        legend = [(i, data.classes[i], _hex(data.palette[i]), i in unseen) for i in card.classes]
        rest = {
            "id": card.id,
            "part": card.part,
            "notes": card.notes,
            "accuracy": card.accuracy,
            "iou": card.iou,
        }
        rest |= {"order": order, "ratio": round(width / height, 4), "objects": card.num_objects}
        shown.append(
            {**rest, "panels": panels, "legend": legend, "has_unseen": bool(unseen & set(card.classes))}
        )
    return shown


def _names(data: DataSet) -> dict[str, dict[str, str]]:
    """What a colour means, by kind of map: what the page says of the pixel under the pointer."""
    classes: dict[str, str] = {}
    for i, name in enumerate(data.classes):
        key = _hex(data.palette[i])
        named = f"{name} (unseen)" if i in data.unseen_ids else name
        classes[key] = f"{classes[key]} or {named}" if key in classes else named
    objects = {
        _hex(colour): f"potential object {i}" for i, colour in enumerate(object_palette()) if 0 < i < 255
    }
    objects[_hex(object_palette()[255])] = "padding"
    errors = {_hex(ERROR_PALETTE[i]): word for i, word in enumerate(ERRORS) if i}
    percent = {_hex(colour): f"{share} %" for share, colour in enumerate(percent_palette())}
    return {"classes": classes, "objects": objects, "errors": errors, "percent": percent}


def _per_class(metrics: Mapping[str, Any] | None, data: DataSet) -> list[dict[str, Any]]:
    """IoU class by class, best first, classes that occur nowhere last."""
    if metrics is None:
        return []
    colours = {name: _hex(data.palette[i]) for i, name in enumerate(data.classes)}
    rows = [
        {
            "name": name,
            "iou": iou,
            "is_unseen": name in metrics["unseen"],
            "colour": colours.get(name, "#888888"),
        }
        for name, iou in metrics["per_class"].items()
    ]
    return sorted(rows, key=lambda row: -1.0 if row["iou"] is None else row["iou"], reverse=True)


def _taken_for(config: Config, metrics: Mapping[str, Any] | None, data: DataSet) -> list[dict[str, Any]]:
    """For every unseen class, what its test pixels were predicted as: shares in percent, largest first."""
    path = facts.metrics_path(config).with_name("confusion.npy")
    if metrics is None or not path.is_file():
        return []
    matrix = np.load(path, allow_pickle=False)
    if matrix.shape != (len(data.classes),) * 2:
        return []
    rows = []
    for i in data.unseen_ids:
        total = int(matrix[i].sum())
        order = [int(j) for j in np.argsort(-matrix[i], kind="stable")[:TAKEN_FOR] if matrix[i][j]]
        shares = [
            {
                "name": data.classes[j],
                "share": 100 * int(matrix[i][j]) / total,
                "is_right": j == i,
                "colour": _hex(data.palette[j]),
            }
            for j in order
        ]
        if total:
            rows.append({"name": data.classes[i], "shares": shares})
    return rows


def _gamma_chart(metrics: Mapping[str, Any] | None) -> Markup:
    sweep = (metrics or {}).get("gamma_sweep", {})
    points = sorted((float(gamma), values) for gamma, values in sweep.items())
    series = {
        SCORES[key]: [(gamma, values[key]) for gamma, values in points if values[key] is not None]
        for key in ("mIoU_S", "mIoU_U", "hIoU")
    }
    return Markup(
        charts.line_chart(
            series,
            what="mIoU of seen and unseen classes and hIoU over gamma",
            x_name="gamma",
            y_name="percent",
            mark_x=(metrics["gamma"], "configured") if metrics else None,
            dots=True,
            width=520,
            height=280,
        )
    )


def _loss_charts(config: Config) -> list[tuple[str, Markup]]:
    curve = facts.losses(config)
    drawn = []
    for key, title in LOSS_TERMS.items():
        points = [(float(row["iteration"]), float(row[key])) for row in curve if key in row]
        chart = charts.line_chart({title: points}, what=f"{title} over iterations", x_name="iteration")
        if chart:
            drawn.append((title, Markup(chart)))
    return drawn


def _time_shares(config: Config) -> list[tuple[str, float]]:
    """Where a training step's time went, in percent."""
    last = (facts.losses(config) or [{}])[-1]
    return [
        (key.removeprefix("time/"), 100 * value) for key, value in last.items() if key.startswith("time/")
    ]


def _objects_chart(config: Config) -> Markup:
    summary = (found_manifest(config, "cluster") or {}).get("summary", {})
    counts = {int(num): int(views) for num, views in summary.get("objects_histogram", {}).items()}
    bars = (
        [(str(num), float(counts.get(num, 0))) for num in range(min(counts), max(counts) + 1)]
        if counts
        else []
    )
    return Markup(
        charts.bar_chart(
            bars,
            what="views by number of potential objects",
            x_name="potential objects in a view",
            y_name="views",
        )
    )
