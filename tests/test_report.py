"""The report, `inspect`, and the pictures in them: by hand where it is small, on a made-up run for the rest."""

import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cache.errors import MissingCache, StaleCache
from cache.ledger import write_manifest
from cache.store import Store
from pipeline.config import UserError, load
from pipeline.data.base import data_of
from pipeline.learning.checkpoint import Checkpoint, save_student
from pipeline.looking import charts, facts, gallery, panels
from pipeline.looking.page import render
from pipeline.models.student import build_student
from pipeline.ops.views import draw_views
from pipeline.report import inspect, report
from pipeline.running.manifests import manifest_path, record_shard, save_config
from pipeline.running.table import config_fingerprint

ROOT = Path(__file__).parents[1]
TRAIN, TEST, SIZE, SIDE, CHANNELS = 66, 5, 64, 8, 8  # 66 images are two shards
BROKEN = 3  # the quarantined row
RED, GREEN = (200, 0, 0), (0, 200, 0)


# ---- pictures ----------------------------------------------------------------------------------


def test_error_map_by_hand():
    # Class 0 is seen, 1 unseen, 2 seen: right, unseen as seen, seen as unseen, seen as seen, no label.
    truth = np.array([[1, 1, 0, 0, -1]], np.int16)
    guess = np.array([[1, 0, 1, 2, 0]], np.int16)
    assert panels.error_map(truth, guess, [1]).tolist() == [[0, 1, 2, 3, 4]]


def test_object_colours_are_distinct_and_leave_their_meanings_to_black_and_grey():
    palette = panels.object_palette()
    assert palette.shape == (256, 3)
    assert len({tuple(colour) for colour in palette}) == 256
    assert tuple(palette[0]) == (0, 0, 0)
    assert tuple(palette[255]) == panels.PADDING_GREY
    apart = np.abs(palette[1:9, None].astype(int) - palette[None, 1:9]).sum(-1)
    assert apart[~np.eye(8, dtype=bool)].min() > 60  # of 765: the first ones are far from one another


def test_an_indexed_png_holds_the_ids():
    ids = np.array([[0, 1, 2], [255, 58, 0]], np.uint8)
    picture = Image.open(io.BytesIO(panels.indexed(ids, panels.object_palette(), clear=0)))
    assert picture.mode == "P"
    assert np.asarray(picture).tolist() == ids.tolist()
    assert picture.info["transparency"] in (0, b"\x00")
    assert np.asarray(picture.convert("RGB"))[1, 1].tolist() == panels.object_palette()[58].tolist()


def test_a_clear_id_beyond_the_palette_is_clear():
    ids = np.array([[0, 1, 255]], np.uint8)
    picture = Image.open(io.BytesIO(panels.indexed(ids, np.array([RED, GREEN], np.uint8), clear=255)))
    assert np.asarray(picture).tolist() == ids.tolist()
    assert np.asarray(picture.convert("RGBA"))[0].tolist() == [[*RED, 255], [*GREEN, 255], [0, 0, 0, 0]]


def test_maps_shrink_by_nearest_and_photographs_fit_their_budget():
    ids = np.repeat(np.repeat(np.array([[7, 9], [9, 7]], np.uint8), 300, 0), 300, 1)
    mime, content = panels.encoded(panels.class_panel("truth", ids, np.zeros((10, 3), np.uint8)), 64)
    assert mime == "image/png"
    small = np.asarray(Image.open(io.BytesIO(content)))
    assert small.shape == (64, 64)
    assert set(np.unique(small)) == {7, 9}
    noise = np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8)
    mime, content = panels.encoded(panels.photo(noise), 512, max_bytes=30_000)
    assert mime == "image/jpeg"
    assert len(content) <= 30_000
    assert Image.open(io.BytesIO(content)).size[0] < 512


def test_what_is_clear_shows_what_lies_under_it():
    image = np.full((4, 4, 3), 100, np.uint8)
    ids = np.array([[0, 255], [1, 1]], np.uint8)
    seen = panels.drawn(panels.class_panel("seen", ids, np.array([RED, GREEN])), (60, 60))
    assert tuple(seen[0, 0]) == RED
    assert tuple(seen[59, 0]) == GREEN
    hatching = {tuple(int(v) for v in colour) for colour in seen[:30, 30:].reshape(-1, 3)}
    assert hatching == {panels.HATCH_DARK, panels.HATCH_LIGHT}
    errors = panels.error_panel("errors", ids, np.zeros_like(ids), [1])
    shown = panels.drawn(errors, (60, 60), image)
    assert shown[0, 0].tolist() == [174] * 3  # 0.45 * 100 + 0.55 * 235 = 174.25
    assert shown[59, 0].tolist() == panels.ERROR_PALETTE[panels.MISSED_UNSEEN].tolist()


def test_a_sheet_keeps_proportions_and_wants_something_to_show():
    wide = panels.Strip("wide", [panels.photo(np.zeros((50, 100, 3), np.uint8))], [("a", RED), ("b" * 90, GREEN)])
    one = panels.sheet([wide], side=200)
    # 24 caption + 100 picture + 22 title + 2 lines of 18 + 12 gap, and 12 above.
    assert one.height == 24 + 100 + 22 + 36 + 12 + 12
    many = panels.sheet([wide] * 30, side=200)
    assert 0.7 < many.width / many.height < 3
    with pytest.raises(ValueError, match="at least one"):
        panels.sheet([])


def test_ticks_by_hand():
    assert charts.ticks(0, 100) == [0, 50, 100]
    assert charts.ticks(0, 7) == [0, 2, 4, 6, 8]
    assert charts.ticks(0.1, 0.3) == [0.1, 0.15, 0.2, 0.25, 0.3]
    assert charts.ticks(5, 5) == [4, 6]
    assert charts.ticks(0, 0) == [0, 0.5]
    assert [charts.short(v) for v in (0.5, 999, 1500, 2e6)] == ["0.5", "999", "1.5k", "2M"]


def test_charts_leave_out_what_is_not_a_number_and_escape_names():
    assert charts.line_chart({"a": []}, what="nothing", x_name="x") == ""
    assert charts.line_chart({"a": [(0, float("nan"))]}, what="nothing", x_name="x") == ""
    chart = charts.line_chart({"<b>": [(0, 1.0), (1, float("inf")), (2, 3.0)], "c": [(0, 2.0)]}, what="w", x_name="x")
    assert "&lt;b&gt;" in chart
    assert "<b>" not in chart
    assert "nan" not in chart
    assert "inf" not in chart
    assert charts.bar_chart([], what="w", x_name="x", y_name="y") == ""
    assert charts.bar_chart([("0", 3.0), ("1", 0.0)], what="w", x_name="x", y_name="y").count("<rect") == 2
    assert len(charts.thinned([(float(i), 1.0) for i in range(10_000)])) <= charts.MAX_POINTS
    assert charts.thinned([(0, 1), (1, 3), (2, 9)], 2) == [(0.5, 2.0), (2.0, 9.0)]


def test_spread_is_even_and_never_more_than_there_is():
    assert gallery.spread(5, 3) == [0, 2, 4]
    assert gallery.spread(2, 9) == [0, 1]
    assert gallery.spread(1, 1) == [0]
    assert gallery.spread(0, 3) == gallery.spread(3, 0) == []


def test_units():
    assert [facts.human_bytes(v) for v in (0, 1023, 1536, 3 << 30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [facts.human_seconds(v) for v in (4, 600, 7200)] == ["4.0 s", "10 min", "2 h 0 min"]


# ---- a made-up run -----------------------------------------------------------------------------


def pseudo_of(row: int, view: int) -> np.ndarray:
    """Objects 1 and 2 in the upper half, of other widths in every row; every third image has none."""
    out = np.zeros((SIDE, SIDE), np.uint8)
    if row % 3:
        out[: SIDE // 2], out[: SIDE // 2, : 1 + row % 5] = 1, 2
    out[:, SIDE - view :] = 255
    return out


def make_cache(config, *, clustered=(0, 1)):
    """Extracts by hand, so that no teacher is needed, and clusters the shards named."""
    data = data_of(config.data)
    ids = [sample.id for sample in data.samples("train")]
    sizes = {"N": TRAIN, "V": 2, "C": CHANNELS, "h": SIDE, "w": SIDE, "K": len(data.classes)}
    teacher = {"model": "tiny", "weights_sha256": "0" * 64, "quick_gelu": False, "image_size": SIZE, "patch": 8}
    attributes = {
        "fingerprint": "e0",
        "data": {"kind": "demo", "name": data.name},
        "classes": list(data.classes),
        "text": {"templates": ["a photo of a {}."], "features": None},
        "teacher": {**teacher, "torch": "0"},
        "mean_colour": [9, 9, 9],
        "views": {"num": 2, "size": SIZE},
    }
    arrays = ("view", "cls", "status", "text", "pseudo")
    store = Store.create(config.cache_path, sizes=sizes, arrays=arrays, samples=ids, attributes=attributes)
    store.write_whole("text", np.eye(len(data.classes), CHANNELS, dtype=np.float32))
    for shard in range(store.num_shards):
        rows = store.rows(shard)
        status = np.array([int(row == BROKEN) for row in rows], np.uint8)
        boxes = np.stack([draw_views("demo", ids[row], 2, SIZE, SIZE, SIZE) for row in rows])
        boxes[status == 1] = np.nan
        made = {"status": status, "view": boxes, "cls": np.zeros((len(rows), 2, CHANNELS), np.float16)}
        bad = {ids[row]: "[truncated] file" for row in rows if row == BROKEN}
        entry = {"rows": [rows.start, rows.stop], "quarantined": bad, "fingerprint": "e0"}
        digests = {name: store.write_shard(name, shard, block) for name, block in made.items()}
        record_shard(config, "extract", shard, entry | {"digests": digests}, 0.0)
        if shard in clustered:
            block = np.stack([[pseudo_of(row, view) for view in range(2)] for row in rows])
            digests = {"pseudo": store.write_shard("pseudo", shard, block)}
            entry = entry | {"fingerprint": "c0", "quarantined": {}, "digests": digests}
            record_shard(config, "cluster", shard, entry, 0.0)
    write_manifest(manifest_path(config, "extract"), {"fingerprint": "e0"})
    if len(clustered) == store.num_shards:
        summary = {"objects_per_view": 1.3, "coverage": 33.0, "tokens_per_mask": 4.5, "largest_mask_share": 60.0}
        summary |= {"views": 2 * TRAIN, "objects_histogram": {"0": 44, "2": 88}, "purity": None}
        summary["verdict"] = ["few objects: 1.0 in a <view>"]
        write_manifest(manifest_path(config, "cluster"), {"fingerprint": "c0", "summary": summary})
    save_config(config)


def make_training(config):
    """An untrained student, a loss curve and the metrics of an evaluation."""
    data, folder = data_of(config.data), config.run_path / "train"
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    text = torch.eye(len(data.classes), CHANNELS)
    checkpoint = Checkpoint(config=config, identity="t0", classes=data.classes, unseen=data.unseen, text=text)
    save_student(folder / "student.safetensors", build_student(config.student, CHANNELS, pretrained=False), checkpoint)
    made = {"fingerprint": "t0", "iterations": 8, "student": "student.safetensors"}
    write_manifest(manifest_path(config, "train"), made)
    rows = [{"iteration": i, "total": 9 / i, "ce": 1.0 / i, "lr": 0.1, "time/forward": 0.75} for i in (4, 8)]
    (folder / "losses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 9, "to')
    save_config(config)
    make_metrics(config, hiou=40.0)


def make_metrics(config, *, hiou):
    data = data_of(config.data)
    scores = {"pAcc": 61.25, "mIoU_S": 48.0, "mIoU_U": None, "hIoU": hiou}
    metrics = {
        **scores,
        "per_class": {name: None if name == "bee" else 10.0 + i for i, name in enumerate(data.classes)},
        "gamma": 1.5,
        "gamma_sweep": {"0.0": scores, "1.5": scores},
        "unseen": list(data.unseen),
        "num_images": TEST,
        "config": config_fingerprint(config, "eval"),
        "student": "t0",
    }
    folder = config.run_path / "eval"
    folder.mkdir(parents=True)
    write_manifest(folder / "metrics.json", metrics)
    matrix = np.zeros((len(data.classes),) * 2, np.int64)
    matrix[data.unseen_ids[0], :2] = 3, 1
    np.save(folder / "confusion.npy", matrix)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The files of a finished run; tests work on copies."""
    config = tiny_config(tmp_path_factory.mktemp("made"))
    make_cache(config)
    make_training(config)
    return config.run_path


def tiny_config(folder, *settings):
    sizes = [f"data.train={TRAIN}", f"data.test={TEST}", f"data.size={SIZE}", f"teacher.image_size={SIZE}"]
    more = ["views.num=2", "student.encoder=tu-resnet10t", "report.images=3", "train.iterations=8"]
    return load(ROOT / "config" / "demo.yaml", [f"runs={folder}/runs", *sizes, *more, *settings])


@pytest.fixture
def run(made, tmp_path):
    """A finished run's config, in a folder of its own."""
    config = tiny_config(tmp_path)
    shutil.copytree(made, config.run_path)
    save_config(config)
    return config


class Page(HTMLParser):
    """What a test asks of a page: its tags in balance, every link and source, its words."""

    VOID = ("meta", "img", "input", "br", "line")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.sources: list[str] = []
        self.cards: list[dict] = []
        self.titles: list[str] = []
        self.words = ""
        self.feed(self.html)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if found.get("class") == "card":
            self.cards.append(found)
        if "data-title" in found:
            self.titles.append(found["data-title"])
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words += data

    @property
    def parts(self):
        """Panel titles by image id."""
        found: dict[str, list[str]] = {}
        for title in self.titles:
            name, part = title.split(" · ")
            found.setdefault(name, []).append(part)
        return found


def test_the_report_holds_everything_and_asks_nothing_of_the_network(run):
    path = report(run)
    assert path == run.run_path / "report" / "index.html"
    page = Page(path)
    assert path.stat().st_size < 15_000_000
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert len(page.cards) == 6
    shown = page.parts
    assert sum(parts == ["image", "truth", "prediction", "errors"] for parts in shown.values()) == 3
    assert sum(parts[:3] == ["image", "seen labels", "pseudo labels"] for parts in shown.values()) == 3
    for words in ("61.2", "40.0", "ladybird", "unseen", "cluster.debug", "sweep", "weights_sha256", "absent"):
        assert words in page.words
    assert "few objects: 1.0 in a <view>" in page.words  # the verdict, as the manifest has it
    assert "[truncated] file" in page.words  # the quarantined image's reason
    assert page.html.count("<svg") == 5  # gamma, objects, and the three curves that the log has
    assert not list(run.run_path.rglob("*.partial"))


def test_images_with_potential_objects_come_first(run):
    page = Page(report(run))
    objects = [card["data-objects"] for card in page.cards if "data-iou" not in card]
    assert objects == ["2", "2", "2"]  # a third of the images has none


def test_names_can_not_break_out_of_the_page(run, monkeypatch):
    data = data_of(run.data)
    monkeypatch.setattr(data, "classes", ("</script><i>", *data.classes[1:]))
    html = render([facts.Run(run)], Store.open(run.cache_path), data, [], about=["<u>"])
    assert "</script><i>" not in html
    assert "<u>" not in html


def test_other_runs_on_the_cache_stand_beside_this_one(run):
    where = [f"cache.path={run.cache_path}", "name=demo-glm_off-0", "train.glm=off"]
    other = tiny_config(run.run_path.parents[1], *where)
    save_config(other)
    make_metrics(other, hiou=12.5)
    stranger = tiny_config(run.run_path.parents[1], "name=stranger")
    save_config(stranger)
    make_metrics(stranger, hiou=99.0)
    (sister,) = facts.sisters(run)
    assert (sister.name, sister.differences) == ("demo-glm_off-0", ("train.glm = off",))
    words = Page(report(run)).words
    assert "train.glm = off" in words
    assert "12.5" in words
    assert "99.0" not in words


def test_report_wants_a_finished_evaluation_of_this_config(run):
    other = run.model_copy(update={"eval": run.eval.model_copy(update={"gamma": 2.0})})
    with pytest.raises(StaleCache, match=r"cli\.py eval"):
        report(other)
    (run.run_path / "eval" / "metrics.json").unlink()
    with pytest.raises(MissingCache, match=r"cli\.py eval"):
        report(run)
    assert not (run.run_path / "report").exists()


# ---- inspect -----------------------------------------------------------------------------------


def test_inspect_prints_the_tree_and_leaves_the_report_alone(run, capsys):
    inspect(run.run_path)
    said = capsys.readouterr().out
    store = Store.open(run.cache_path)
    for words in ("66 x 2 x 8 x 8", "float16", str(store.size_bytes("pseudo")), "0" * 64, "2 of 2 shards", "complete"):
        assert words in said
    assert "train-00003  [truncated] file" in said
    page = run.run_path / "inspect" / "index.html"
    assert said.rstrip().endswith(f"page: {page}")
    assert len(Page(page).cards) == 6
    assert not (run.run_path / "report").exists()


def test_a_cache_can_be_looked_into_before_training(tmp_path, capsys):
    config = tiny_config(tmp_path)
    make_cache(config, clustered=(0,))
    inspect(config.run_path)
    said = capsys.readouterr().out
    assert "cluster  1 of 2 shards, not complete" in said
    assert "train  0 of 8 iterations, not run" in said
    page = Page(config.run_path / "inspect" / "index.html")
    assert "Pseudo labels: 1 of 2 shards are done." in page.words
    assert "No student yet" in page.words
    assert len(page.cards) == 3
    assert "hIoU" not in page.words
    inspect(config.run_path, image="train-00065")  # of the shard that isn't clustered
    parts = Page(config.run_path / "inspect" / "index.html").parts["train-00065"]
    assert parts[:2] == ["image", "seen labels"]
    assert "pseudo labels" not in parts


def test_inspect_one_image_shows_all_its_views(run):
    inspect(run.run_path, image="train-00007")
    page = Page(run.run_path / "inspect" / "index.html")
    assert set(page.parts) == {"train-00007"}
    assert page.parts["train-00007"].count("pseudo labels") == 2
    inspect(run.run_path, image=f"train-{BROKEN:05d}")
    assert "quarantined" in Page(run.run_path / "inspect" / "index.html").words


def test_inspect_one_class_shows_only_images_that_hold_it(run):
    data = data_of(run.data)
    inspect(run.run_path, class_name="bee")
    page = Page(run.run_path / "inspect" / "index.html")
    assert page.parts
    samples = {sample.id: sample for part in ("train", "test") for sample in data.samples(part)}
    assert all((data.labels(samples[name]) == data.classes.index("bee")).any() for name in page.parts)


@pytest.mark.parametrize(
    ("wrong", "near"), [({"image": "tran-00007"}, "'train-00007'"), ({"class_name": "zbra"}, "'zebra'")]
)
def test_wrong_names_are_answered_with_the_nearest(run, capsys, wrong, near):
    with pytest.raises(UserError, match=near) as found:
        inspect(run.run_path, **wrong)
    assert "\n" not in str(found.value)
    assert capsys.readouterr().out == ""


def test_a_wrong_run_is_answered_with_the_nearest(run):
    with pytest.raises(UserError, match="'demo'"):
        inspect(run.run_path.with_name("demmo"))


def test_inspect_works_on_a_run_that_was_moved(run, tmp_path):
    moved = tmp_path / "elsewhere" / "old"
    shutil.move(run.run_path, moved)
    inspect(moved)
    assert "old" in Page(moved / "inspect" / "index.html").words


def test_inspect_writes_panels_as_a_png(run, tmp_path):
    inspect(run.run_path, png=tmp_path / "new" / "panels.png")
    with Image.open(tmp_path / "new" / "panels.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 400
    assert not (run.run_path / "inspect").exists()


def test_export_writes_indexed_masks_at_the_images_own_size(run, tmp_path, capsys):
    inspect(run.run_path, export=tmp_path / "out")
    names = {path.stem for path in (tmp_path / "out").iterdir()}
    assert len(names) == TRAIN - 1  # the quarantined one has none
    assert f"train-{BROKEN:05d}" not in names
    assert f"{TRAIN - 1} pseudo label maps" in capsys.readouterr().out
    with Image.open(tmp_path / "out" / "train-00065.png") as picture:
        assert picture.mode == "P"
        assert picture.size == (SIZE, SIZE)
        wanted = np.kron(pseudo_of(65, 0), np.ones((SIZE // SIDE,) * 2, np.uint8))
        assert np.array_equal(np.asarray(picture), wanted)
    inspect(run.run_path, image="train-00001", export=tmp_path / "one")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["train-00001.png"]


def test_export_wants_pseudo_labels(tmp_path):
    config = tiny_config(tmp_path)
    make_cache(config, clustered=())
    with pytest.raises(MissingCache, match=r"cli\.py cluster"):
        inspect(config.run_path, export=tmp_path / "out")
