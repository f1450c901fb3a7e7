"""The report of a CLIP-ES run, on a cache made by hand: what a card shows, its masks and scores, the export."""

import json

import numpy as np
import pytest
from PIL import Image

from cache.errors import MissingCache
from cache.ledger import write_manifest
from cache.store import Store
from pipeline.config import load
from pipeline.data.base import data_of
from pipeline.looking.facts import Run
from pipeline.looking.gallery import Card
from pipeline.looking.page import render
from pipeline.looking.tagged import Tagged, percent_palette
from pipeline.report import inspect
from pipeline.running.manifests import manifest_path, record_shard, save_config
from tests.test_report import ROOT, Page

TRAIN, SIZE, SIDE, MOST = 5, 64, 4, 3
UNTAGGED, BROKEN = 1, 3  # rows: an image without a class, a quarantined one


@pytest.fixture
def run(tmp_path):
    return made(tmp_path, "cams.debug=true")


def made(folder, *settings, shards=(0,)):
    """A run whose one shard is extracted, and has CAMs if it is named."""
    sizes = [f"data.train={TRAIN}", "data.test=2", f"data.size={SIZE}", f"teacher.image_size={SIZE}"]
    es = ["recipe=clip_es", "data.background=[grass,sand,water,brick]", "cache.tokens=pooled", "train.confidence=0.75"]
    config = load(ROOT / "config" / "demo.yaml", [f"runs={folder}/runs", *sizes, *es, *settings])
    data = data_of(config.data)
    ids, num = [sample.id for sample in data.samples("train")], len(data.classes)
    store = Store.create(
        config.cache_path,
        sizes={"N": TRAIN, "V": 1, "C": 2, "h": 8, "w": 8, "K": num},
        arrays=("view", "cls", "pooled", "status", "text"),
        samples=ids,
        attributes={
            "fingerprint": "e0",
            "data": {"kind": "demo", "name": data.name},
            "classes": list(data.classes),
            "views": {"num": 1, "size": SIZE},
            "teacher": {"patch": 8},
        },
    )
    store.write_whole("text", np.eye(num, 2, dtype=np.float32))
    usable = np.arange(TRAIN) != BROKEN
    view = np.where(usable[:, None, None], np.array([0, 0, SIZE, SIZE], np.float32), np.nan).astype(np.float32)
    token = np.zeros((TRAIN, 1, 2), np.float16)
    write(store, config, "extract", {"view": view, "cls": token, "pooled": token, "status": (~usable).astype(np.uint8)})
    names = ["cam", "cam_class", "cam_shape"] + ["cam_raw"] * config.cams.debug
    names += ["mask", "confidence"] * (config.cams.refine != "none")
    axes = {"K_max": MOST, "g_h": SIDE, "g_w": SIDE, "H": SIZE + 8, "W": SIZE + 8}
    store.add_arrays(tuple(names), axes)
    store = Store.open(config.cache_path)
    for shard in shards:
        blocks = {name: by_hand(store, name) for name in names}
        for block in blocks.values():
            block[~usable] = store.spec(name_of(blocks, block)).fill
        write(store, config, "cams", blocks, shard)
    if shards:
        seeds = {"CAM": {"power 1": 41.5}, "CAM + CAA": {"power 1": 52.25}}
        summary = {"images": 4, "maps": 6, "empty": 1, "untagged": 1, "refined": 63.75, "seeds": seeds}
        write_manifest(manifest_path(config, "cams"), {"fingerprint": "c0", "summary": summary})
    write_manifest(manifest_path(config, "extract"), {"fingerprint": "e0"})
    save_config(config)
    return config


def name_of(blocks, block):
    return next(name for name, other in blocks.items() if other is block)


def by_hand(store, name):
    """Classes 7 and 3 in every image but one, on 2 x 3 tokens: 3's map is 0.9 on the right, 7's is 0.2 on the left."""
    block = np.zeros((TRAIN, *store.spec(name).shape(store.sizes)[1:]), store.spec(name).dtype)
    if name == "cam_class":
        block[:] = 255
        block[:, :2] = 7, 3
        block[UNTAGGED] = 255
    elif name == "cam_shape":
        block[:] = 2, 3
    elif name == "cam":
        block[:, 0, :2, 0], block[:, 1, :2, 2] = 0.2, 0.9
        block[UNTAGGED] = 0
    elif name == "cam_raw":
        block[:, 1, 0, 2] = 1
        block[UNTAGGED] = 0
    else:  # refined at half the image's size: class 3 above, background below, sure to 0.5 and 0.8
        block[:] = {"mask": 255, "confidence": 0}[name]
        block[:, :16, :32], block[:, 16:32, :32] = {"mask": (3, 0), "confidence": (100, 160)}[name]
    return block


def write(store, config, stage, blocks, shard=0):
    digests = {name: store.write_shard(name, shard, block) for name, block in blocks.items()}
    bad = {store.samples[BROKEN]: "[truncated] file"} if stage == "extract" else {}
    entry = {"rows": [0, TRAIN], "quarantined": bad, "fingerprint": f"{stage[0]}0", "digests": digests}
    record_shard(config, stage, shard, entry, 0.0)


def card_of(config, row):
    store, data = Store.open(config.cache_path), data_of(config.data)
    (card,) = Tagged(config, store, data, {0}).cards(data.samples("train")[row], row, True, 1)
    return card


def test_percent_colours_tell_a_hundred_and_one_values_apart_and_grow_brighter():
    palette = percent_palette()
    assert len({tuple(colour) for colour in palette}) == 101
    assert tuple(palette[50]) == (125, 124, 120)
    brightness = palette @ np.array([0.2126, 0.7152, 0.0722])  # luma of ITU-R BT.709
    assert (np.diff(brightness) > 0).all()


def test_a_card_shows_maps_mask_confidence_and_truth(run):
    card, data = card_of(run, 0), data_of(run.data)
    three, seven = data.classes[3], data.classes[7]
    assert [panel.title for panel in card.panels] == [
        "image",
        *(f"{seven}: CAM", f"{seven}: CAM + CAA", f"{three}: CAM", f"{three}: CAM + CAA"),
        *("mask", "confidence", "trained on", "truth"),
    ]
    shown = {panel.title: panel.pixels for panel in card.panels}
    assert shown[f"{seven}: CAM + CAA"].tolist() == [[20, 0, 0], [20, 0, 0]]  # its own grid, in percent
    assert shown[f"{three}: CAM"].tolist() == [[0, 0, 100], [0, 0, 0]]
    # Right edge: background 1 - 0.9, class 3's 0.9: it wins, 0.9 of 1.0. Left edge: 0.8 background, 0.2 class 7.
    # Middle, bilinear between 0 and 0 but for the sides: background, towards 1.
    mask, sure, used = shown["mask"], shown["confidence"], shown["trained on"]
    assert (mask[:, -1] == 3).all()
    assert (sure[:, -1] == 90).all()
    assert (mask[:, 0] == 0).all()
    assert (sure[:, 0] == 80).all()
    assert ((used == 255) == (sure < 75)).all()
    assert (used[:, [0, -1]] == mask[:, [0, -1]]).all()
    assert np.array_equal(shown["truth"], data.labels(data.samples("train")[0]))
    assert card.notes == (f"{seven}, {three}", f"{round(100 * (sure >= 75).mean())} % at 0.75 or surer")
    truth = shown["truth"]
    assert card.accuracy == pytest.approx(100 * (mask == truth).mean())
    ids = np.union1d(np.unique(mask), np.unique(truth))
    iou = [((mask == i) & (truth == i)).sum() / ((mask == i) | (truth == i)).sum() for i in ids]
    assert card.iou == pytest.approx(100 * np.mean(iou))
    assert card.classes == tuple(ids)


def test_an_image_without_a_class_is_background(run):
    card = card_of(run, UNTAGGED)
    assert [panel.title for panel in card.panels] == ["image", "mask", "confidence", "trained on", "truth"]
    assert (card.panels[1].pixels == 0).all()
    assert (card.panels[2].pixels == 100).all()
    assert card.notes == ("no class", "100 % at 0.75 or surer")


def test_refined_masks_are_shown_as_they_were_refined(tmp_path):
    config = made(tmp_path, "cams.refine=pamr", "cams.max_side=32")
    shown = {panel.title: panel.pixels for panel in card_of(config, 0).panels}
    half = np.repeat([3, 0], SIZE // 2)[:, None] * np.ones((1, SIZE))
    assert np.array_equal(shown["mask"], half)
    assert set(np.unique(shown["confidence"][: SIZE // 2])) == {50}
    assert set(np.unique(shown["confidence"][SIZE // 2 :])) == {80}
    assert np.array_equal(shown["trained on"] == 255, half == 3)
    assert not any("CAM" in title and "CAA" not in title for title in shown)  # cam_raw wasn't kept


def test_the_page(run, capsys):
    inspect(run.run_path)
    said = capsys.readouterr().out
    assert "cams  1 of 1 shards, complete" in said
    assert "cluster " not in said.partition("stages")[2]
    page = Page(run.run_path / "inspect" / "index.html")
    assert len(page.cards) == TRAIN
    assert page.parts["train-00000"][-4:] == ["mask", "confidence", "trained on", "truth"]
    for words in (
        "52.2",
        "41.5",
        "at pixels, the masks reach 63.8",
        "CAM + CAA",
        "6 maps",
        "activation map, before and after",
        "quarantined",
    ):
        assert words in page.words
    for words in ("unseen", "Gamma", "hIoU"):  # all classes are seen, and taught
        assert words not in page.html.partition("</style>")[2].partition("The whole config")[0]
    assert "Potential objects" not in page.words
    assert "potential object" not in page.html.partition("<script>")[0]
    names = json.loads(page.html.partition("const NAMES = ")[2].partition(";\n")[0])["percent"]
    assert names["#7d7c78"] == "50 %"
    assert [("data-iou" in card) for card in page.cards] == [row != BROKEN for row in range(TRAIN)]


def test_the_key_of_errors_is_of_a_closed_set(run):
    store, data = Store.open(run.cache_path), data_of(run.data)
    html = render([Run(run)], store, data, [Card("test-00000", "test")])
    key = html.partition('<ul class="key"')[2].partition("</ul>")[0]
    assert "mixed up within its group" in key
    assert "no label" in key
    assert "unseen" not in key


def test_before_the_maps_are_made(tmp_path, capsys):
    config = made(tmp_path, shards=())
    inspect(config.run_path)
    page = Page(config.run_path / "inspect" / "index.html")
    assert "CAMs: 0 of 1 shards are done." in page.words
    assert page.parts["train-00000"] == ["image", "truth"]
    with pytest.raises(MissingCache, match=r"cli\.py cams"):
        inspect(config.run_path, export=tmp_path / "out")


def test_export_writes_the_masks(run, tmp_path, capsys):
    inspect(run.run_path, export=tmp_path / "out")
    assert f"{TRAIN - 1} masks" in capsys.readouterr().out
    data = data_of(run.data)
    with Image.open(tmp_path / "out" / "train-00000.png") as picture:
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), card_of(run, 0).panels[5].pixels)
        colours = np.asarray(picture.convert("RGB"))
        assert tuple(colours[0, -1]) == tuple(data.palette[3])
