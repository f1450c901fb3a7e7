"""Which prompt suits a data set: CLIP-ES's sharpness-based selection, on the cached features of whole images.

    python cli.py prompts --config config/clip_es_voc.yaml
    python cli.py prompts --config config/clip_es_voc.yaml --templates "a photo of a {}." --templates "a {}."

The teacher encodes text alone here. Writes prompts.json and prompts.png into the run folder.

Axes: n images, T templates, K classes, N background names, C joint space.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize

from cache.errors import MissingCache
from cache.files import whole_file, write_text
from cache.store import Store
from cache.verify import OK, check_whole, read_recorded
from pipeline.config import Config
from pipeline.data.base import DataError, DataSet, data_of
from pipeline.data.prompts import templates
from pipeline.data.words import background_names, fused_name
from pipeline.ops.quantise import dequantised
from pipeline.ops.sharpness import sharpness
from pipeline.running.console import progress, say
from pipeline.running.manifests import required_manifest, save_config
from pipeline.running.rows import current_samples
from pipeline.teaching.maps import explained_teacher

SHOWN = 10  # templates in the printed table
WHOLE = 0  # the view that is the whole image


def select_prompt(config: Config, candidates: Sequence[str]) -> str:
    """Ranks the templates (or those of a named set) and the config's own; says and writes which is best, returns it.

    Raises: MissingCache, StaleCache, CorruptShard, DataError (a template without braces, no image with two classes).
    """
    data = data_of(config.data)
    above = required_manifest(config, "extract")
    chosen = templates(candidates[0] if len(candidates) == 1 else candidates)
    chosen = tuple(dict.fromkeys((*chosen, config.cams.template)))
    store = Store.open(config.cache_path)
    check_whole(store, above)
    teacher = explained_teacher(config.teacher, config.cams)
    words = [fused_name(config.cams.synonyms, name) for name in data.classes]
    names = [*words, *background_names(config.cams.background)]
    features = teacher.encode_text([[template.replace("{}", name)] for template in chosen for name in names])
    features = features.clone().unflatten(0, (len(chosen), len(names)))  # (T, K + N, C)
    scale = teacher.logit_scale
    total, num_images, num_counted = torch.zeros(len(chosen), dtype=torch.float64), 0, 0
    with progress("prompts", store.num_samples) as advance:
        for pooled, present in _images(config, data, store, str(above["fingerprint"])):
            total += sharpness(pooled, present, features[:, : len(words)], features[:, len(words) :], scale)
            num_images += len(pooled)
            num_counted += int((present.sum(1) > 1).sum())
            advance(len(pooled))
    if not num_counted:
        raise DataError(
            f"{data.name}: none of {num_images} images has two classes or more, and sharpness compares an image's "
            "classes. Choose cams.template by hand."
        )
    order = total.argsort(stable=True).tolist()
    ranking = [(chosen[place], float(total[place])) for place in order]
    _write(config, ranking, {"images": num_images, "with several classes": num_counted})
    return ranking[0][0]


def _images(config: Config, data: DataSet, store: Store, fingerprint: str) -> Iterator[tuple[Tensor, Tensor]]:
    """Shard by shard the usable images: mean of the dense tokens (n, C), unit norm; their classes (n, K) bool."""
    arrays = [name for name in ("pooled", "tokens", "token_scale") if store.has(name)]
    if not arrays:
        raise MissingCache(
            f"{config.cache_path}: keeps no dense tokens nor their mean (cache.tokens: {config.cache.tokens}), and "
            "prompts needs one of them. Extract with cache.tokens pooled, into another cache.path."
        )
    samples = current_samples(data, store)
    for shard in range(store.num_shards):
        blocks = read_recorded(store, shard, {"extract": fingerprint}, (*arrays, "status"))
        good = blocks["status"] == OK
        pooled = _pooled({name: blocks[name][good, WHOLE] for name in arrays})
        present = torch.zeros(len(pooled), len(data.classes), dtype=torch.bool)
        usable = [samples[row] for row in np.array(store.rows(shard))[good]]
        for place, sample in enumerate(usable):
            present[place, list(data.tags(sample))] = True
        yield normalize(pooled, dim=1), present


def _pooled(blocks: dict[str, np.ndarray]) -> Tensor:
    """(n, C) float32 of whatever is kept: the means, or tokens (n, h, w, C), in int8 with their scales."""
    if "pooled" in blocks:
        return torch.from_numpy(blocks["pooled"]).float()
    tokens = torch.from_numpy(blocks["tokens"])
    if "token_scale" in blocks:
        tokens = dequantised(tokens, torch.from_numpy(blocks["token_scale"]))
    return tokens.float().mean((1, 2))


# ---- what is left behind -------------------------------------------------------------------------


def _write(config: Config, ranking: Sequence[tuple[str, float]], counts: dict[str, int]) -> None:
    save_config(config)
    table = Table("", "template", "sharpness", title=f"{len(ranking)} templates, the lowest is the best")
    for place, (template, value) in enumerate(ranking[:SHOWN], start=1):
        table.add_row(str(place), template, f"{value:.4g}")
    say(table)
    content: dict[str, Any] = {"winner": ranking[0][0], **counts}
    content["ranking"] = [{"template": template, "sharpness": value} for template, value in ranking]
    path = config.run_path / "prompts.json"
    write_text(path, json.dumps(content, indent=1) + "\n")
    drawn = path.with_suffix(".png")
    with whole_file(drawn) as file:
        bars(ranking).save(file, "PNG")
    say(f"prompts: the ranking is in {path} and {drawn}")
    say(f"prompts: for the config:  cams: {{template: {json.dumps(ranking[0][0])}}}")


LINE, BAR, SIZE = 20, 400, 13  # pixels: a row's height, the longest bar, the letters


def bars(ranking: Sequence[tuple[str, float]]) -> Image.Image:
    """The ranking as horizontal bars from 0, best first."""
    font = ImageFont.load_default(SIZE)
    widest = int(max(font.getlength(template) for template, _ in ranking)) + LINE
    highest = max(value for _, value in ranking) or 1.0
    page = Image.new("RGB", (widest + BAR + 5 * LINE, LINE * (len(ranking) + 1)), "white")
    pen = ImageDraw.Draw(page)
    for place, (template, value) in enumerate(ranking):
        y, length = LINE // 2 + place * LINE, round(BAR * value / highest)
        pen.text((LINE // 2, y), template, fill="black", font=font)
        colour = "#1f6f3f" if place == 0 else "#9fb4c7"
        pen.rectangle((widest, y + 2, widest + length, y + LINE - 5), fill=colour)
        pen.text((widest + length + 4, y), f"{value:.4g}", fill="black", font=font)
    return page
