"""The report in a browser: nothing logged, nothing asked for, pictures there, filters, paging; several runs."""

import json
import re
import shutil

import numpy as np
import pytest

from cache.errors import MissingCache
from cache.ledger import read_manifest
from pipeline.config import UserError
from pipeline.data.base import data_of
from pipeline.learning.checkpoint import CheckpointError
from pipeline.looking import facts, scores
from pipeline.report import inspect, report, report_runs
from pipeline.running.manifests import save_config
from tests.browser import Browser
from tests.test_report import Page, make_cache, make_metrics, make_training, tiny_config


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two runs on one cache, evaluated; tests only read them."""
    folder = tmp_path_factory.mktemp("pair")
    first = tiny_config(folder)
    make_cache(first)
    make_training(first)
    other = tiny_config(folder, f"cache.path={first.cache_path}", "name=other", "train.glm=off")
    shutil.copytree(first.run_path / "train", other.run_path / "train")
    make_metrics(other, hiou=12.5)
    save_config(other)
    return first, other


@pytest.fixture(scope="module")
def pages(pair):
    first, other = pair
    return report(first), report_runs([first.run_path, other.run_path])


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


# ---- several runs ------------------------------------------------------------------------------


def test_several_runs_stand_side_by_side(pair, pages):
    assert pages[1] == pair[0].run_path / "report" / "side-by-side.html"
    page = Page(pages[1])
    tests = [parts for name, parts in page.parts.items() if name.startswith("test-")]
    wanted = ["image", "truth", "prediction A", "errors A", "prediction B", "errors B"]
    assert len(tests) == 3
    assert all(parts == wanted for parts in tests)
    for words in ("40.0", "12.5", "train.glm = off", "IoU A"):
        assert words in page.words
    assert page.html.count('class="matrix') == 2
    assert not re.search(r"https?://|@import|url\(", page.html)
    assert pages[1].stat().st_size < 15_000_000


def test_each_run_has_its_own_gamma(pair):
    first, other = pair
    metrics = json.loads(facts.metrics_path(other).read_text()) | {"gamma": 0.5}
    runs = [facts.Run(first, read_manifest(facts.metrics_path(first)), "A"), facts.Run(other, metrics, "B")]
    assert "configured" not in scores.gamma_charts(runs)[0][1]
    runs[1] = facts.Run(other, metrics | {"gamma": runs[0].metrics["gamma"]}, "B")
    assert "configured" in scores.gamma_charts(runs)[0][1]


def test_differences_go_both_ways(pair):
    one = pair[0].model_copy(deep=True)
    one.student.options["decoder_dropout"] = 0.5
    assert facts.differences(pair[0], one) == ("student.options.decoder_dropout = 0.5",)
    assert len(facts.differences(one, pair[0])) == 1


def test_a_damaged_student_is_an_error_and_not_an_absent_one(pair, tmp_path):
    shutil.copytree(pair[0].run_path, tmp_path / "hurt")
    path = tmp_path / "hurt" / "train" / "student.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a student of this project"):
        inspect(tmp_path / "hurt")


def test_runs_that_can_not_stand_side_by_side_are_one_line(pair, tmp_path):
    first, other = pair
    with pytest.raises(UserError, match="named twice"):
        report_runs([first.run_path, other.run_path, first.run_path])
    with pytest.raises(UserError, match="at most 6"):
        report_runs([first.run_path] * 7)
    strange = tiny_config(tmp_path, "data.test=4")
    save_config(strange)
    make_metrics(strange, hiou=1.0)
    with pytest.raises(UserError, match=r"other test images than demo.*cli\.py results"):
        report_runs([first.run_path, strange.run_path])
    split = tiny_config(tmp_path, "name=split", "data.unseen=[bee]")
    save_config(split)
    with pytest.raises(UserError, match="other unseen classes"):
        report_runs([first.run_path, split.run_path])
    bare = tiny_config(tmp_path, "name=bare")
    save_config(bare)
    with pytest.raises(MissingCache, match=r"cli\.py eval"):
        report_runs([first.run_path, bare.run_path])


def test_the_command_takes_run_folders(pair, run_cli, tmp_path):
    folders = [config.run_path for config in pair]
    done = run_cli("report", *folders, "--out", tmp_path / "new" / "page.html")
    assert done.returncode == 0, done.stderr
    assert Page(tmp_path / "new" / "page.html").parts
    assert run_cli("report", *folders, "--set", "train.lr=1").returncode == 2
    assert run_cli("report", "--out", tmp_path / "x.html").returncode == 2
    assert run_cli("report", pair[0].run_path.with_name("demmo")).returncode == 2


# ---- by hand -----------------------------------------------------------------------------------


def test_shares_and_mistakes_by_hand(pair):
    data = data_of(pair[0].data)
    matrix = np.zeros((len(data.classes),) * 2, np.int64)
    unseen, seen = data.unseen_ids[0], data.seen_ids[0]
    matrix[unseen, unseen], matrix[unseen, seen], matrix[seen, seen] = 1, 3, 7
    percent = scores.shares(matrix)
    assert (percent[unseen, unseen], percent[unseen, seen], percent[seen, seen]) == (25, 75, 100)
    assert (percent[data.seen_ids[1]] == scores.NO_PIXEL).all()
    (mistake,) = scores.largest(matrix, data)
    wanted = {"truth": data.classes[unseen], "guess": data.classes[seen], "share": 75, "pixels": 3}
    assert mistake == wanted | {"is_unseen": True}


def test_a_resumed_trainings_seconds_add_up():
    curve = [{"iteration": i, facts.ELAPSED: s} for i, s in enumerate((2.0, 5.0, 1.0, 4.0))]
    assert facts.elapsed_s(curve) == 9  # 5 until it was stopped, 4 since it went on
    assert facts.elapsed_s([{"iteration": 1}]) is None


def test_bytes_by_stage(pair):
    config = pair[0]
    found = {f.name: f for f in facts.stage_facts(config, facts.Store.open(config.cache_path), {"num_images": 5})}
    files = [p for p in (config.run_path / "train").rglob("*") if p.is_file()]
    assert found["train"].size_bytes == sum(p.stat().st_size for p in files) > 0
    assert found["extract"].size_bytes > found["cluster"].size_bytes > 0
    assert found["train"].num_images == 8 * config.train.batch
    assert found["eval"].seconds is None  # not recorded
    made = {"num_images": 5, "made": {"seconds": 2.5}}
    *_, tested = facts.stage_facts(config, facts.Store.open(config.cache_path), made)
    assert (tested.name, tested.seconds, tested.num_images) == ("eval", 2.5, 5)


# ---- in a browser ------------------------------------------------------------------------------

SHOWN = "[...document.querySelectorAll('#test .card')].filter(c => !c.hidden)"


def choose(browser, part, control, value):
    browser.run(
        f"(() => {{ const s = document.querySelector('#{part} .{control}'); s.value = {value!r}; "
        "s.dispatchEvent(new Event('change')); if (s.value !== " + repr(value) + ") throw 'no such option'; })()"
    )


def shown(browser, part="test"):
    return browser.run(SHOWN.replace("#test", f"#{part}") + ".map(c => c.querySelector('strong').textContent)")


@pytest.mark.browser
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(("width", "dark"), [(400, False), (400, True), (2560, False), (2560, True)])
def test_a_page_shows_its_pictures_and_logs_nothing(browser, pages, which, width, dark):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(pages[which], width=width, dark=dark)
    pictures = browser.run("[...document.images].map(i => i.complete && i.naturalWidth)")
    assert pictures
    assert all(pictures)
    assert browser.run("document.documentElement.scrollWidth") == width  # no sideways scrolling
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background))) < 200) == dark
    assert browser.errors == []
    assert browser.requests == [pages[which].as_uri()]


@pytest.mark.browser
def test_filters_and_orders(browser, pages, pair):
    data = data_of(pair[0].data)
    samples = {sample.id: np.unique(data.labels(sample)) for sample in data.samples("test")}
    browser.open(pages[0])
    everything = shown(browser)
    assert len(everything) == 3
    cards = browser.run(SHOWN + ".map(c => [c.querySelector('strong').textContent, c.dataset.classes])")
    for number in sorted({word for _, classes in cards for word in classes.split()}):
        choose(browser, "test", "by-class", number)
        assert shown(browser) == [name for name, classes in cards if number in classes.split()]
    choose(browser, "test", "by-class", "")
    unseen = {*data.unseen_ids}
    for value, wanted in (("1", True), ("0", False)):
        choose(browser, "test", "by-group", value)
        assert shown(browser) == [n for n in everything if bool(unseen & {*samples[n].tolist()}) == wanted]
    choose(browser, "test", "by-group", "")
    options = browser.run("[...document.querySelectorAll('#test .by-objects option')].map(o => o.value)")
    for option in options[1:]:
        low, high = map(int, option.split())
        choose(browser, "test", "by-objects", option)
        assert shown(browser) == [n for n in everything if low <= len(samples[n]) <= high]
    choose(browser, "test", "by-objects", "")
    choose(browser, "test", "by-order", "iou,1")
    values = browser.run(SHOWN + ".map(c => Number(c.dataset.iou))")
    assert values == sorted(values)
    choose(browser, "test", "by-order", "iou,-1")
    assert browser.run(SHOWN + ".map(c => Number(c.dataset.iou))") == values[::-1]
    choose(browser, "train", "by-objects", "2 2")  # of the made-up pseudo labels all have two
    assert len(shown(browser, "train")) == 3
    assert browser.errors == []


@pytest.mark.browser
def test_what_no_image_fits_is_said_and_taken_back(browser, pages, pair):
    browser.open(pages[0])
    absent = browser.run(
        "[...document.querySelectorAll('#train .by-class option')].map(o => o.value).find(v => v && "
        "![...document.querySelectorAll('#train .card')].some(c => c.dataset.classes.split(' ').includes(v)))"
    )
    choose(browser, "train", "by-class", absent)
    assert shown(browser, "train") == []
    assert not browser.run("document.querySelector('#train .none').hidden")
    browser.run("document.querySelector('#train .reset').click()")
    assert len(shown(browser, "train")) == 3


@pytest.mark.browser
def test_a_click_enlarges_and_keys_page(browser, pages):
    browser.open(pages[1])
    title = "document.querySelector('#zoom[open] strong')?.textContent ?? ''"
    names = shown(browser)
    browser.run("document.querySelector('#test button.panel').click()")
    assert browser.run(title) == f"{names[0]} · image"
    for key, wanted in (
        ("ArrowRight", f"{names[0]} · truth"),
        ("ArrowDown", f"{names[1]} · truth"),
        ("ArrowLeft", f"{names[1]} · image"),
        ("ArrowUp", f"{names[0]} · image"),
        ("Escape", ""),
    ):
        browser.press(key)
        assert browser.run(title) == wanted
    assert browser.errors == []


@pytest.mark.browser
def test_pointing_at_maps_and_matrices_reads_them(browser, pages, pair):
    data = data_of(pair[0].data)
    browser.open(pages[0])
    tip = "document.getElementById('tip').hidden ? '' : document.getElementById('tip').textContent"
    middle = (
        "(() => {{ const e = document.querySelector({what!r}); "
        "e.scrollIntoView({{behavior: 'instant', block: 'center'}}); "
        "const b = e.getBoundingClientRect(); return [b.left, b.top, b.width, b.height]; }})()"
    )
    # Of the made-up matrix only the first unseen class has pixels: three taken for class 0, one for class 1.
    order = [*data.seen_ids, *data.unseen_ids]
    left, top, width, height = browser.run(middle.format(what="#confusion .stack"))
    row = order.index(data.unseen_ids[0])
    for column, wanted in ((order.index(0), "75 %"), (order.index(1), "25 %"), (order.index(5), "0 %")):
        browser.point(left + width * (column + 0.5) / len(order), top + height * (row + 0.5) / len(order))
        said = f"{data.classes[data.unseen_ids[0]]} taken for {data.classes[order[column]]}: {wanted}"
        assert browser.run(tip) == said
    browser.point(left + 2, top + 2)
    assert browser.run(tip) == f"{data.classes[order[0]]}: no test pixel"
    left, top, width, height = browser.run(middle.format(what="#test .stack[data-title$=truth]"))
    browser.point(left + width / 2, top + height / 2)
    name = shown(browser)[0]
    truth = next(data.labels(sample) for sample in data.samples("test") if sample.id == name)
    middle_class = data.classes[int(truth[truth.shape[0] // 2, truth.shape[1] // 2])]
    assert browser.run(tip).removesuffix(" (unseen)") == middle_class


@pytest.mark.browser
def test_a_page_of_a_run_without_a_student(browser, tmp_path):
    config = tiny_config(tmp_path)
    make_cache(config, clustered=(0,))
    inspect(config.run_path)
    browser.errors.clear()
    browser.open(config.run_path / "inspect" / "index.html", width=400)
    assert len(shown(browser, "train")) == 3
    assert browser.errors == []
