"""Figures of a run: attention and purity by hand, what is drawn of which cache, sizes, the command."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from cache.errors import MissingCache
from cache.store import Store
from pipeline.config import UserError
from pipeline.data.base import data_of
from pipeline.looking.figures import MAX_BYTES, attention, figures, fitted_png, telling_rows
from pipeline.looking.gallery import Pupil
from pipeline.looking.quality import coverage, majorities
from pipeline.ops.losses import pooled
from pipeline.report import draw_figures, report
from tests.test_report import Page, make_cache, make_training, tiny_config


def test_majorities_by_hand():
    # Object 1 has two tokens of class 0 and one of class 1, object 2 one of class 1; annotated, padding and
    # unlabelled tokens don't count. Class 0: two of two follow; class 1: one of two.
    pseudo = np.array([[1, 1, 1, 2], [0, 255, 2, 0]], np.uint8)
    truth = np.array([[0, 0, 1, 1], [0, 1, -1, 1]], np.int16)
    followed, tokens = majorities(pseudo, truth, 3)
    assert followed.tolist() == [2, 1, 0]
    assert tokens.tolist() == [2, 2, 0]


def test_coverage_by_hand():
    maps = np.array([[[0, 1], [2, 255]], [[0, 0], [0, 0]], [[255, 255], [255, 255]]], np.uint8)
    assert coverage(maps) == pytest.approx([2 / 3, 0, 0])


class Fixed(nn.Module):
    """A student whose features are the same whatever it sees."""

    def __init__(self, dense):
        super().__init__()
        self.dense = nn.Parameter(dense)

    def forward(self, images):
        return self.dense[None]


def trained_with(length):
    config = SimpleNamespace(teacher=SimpleNamespace(image_size=8), train=SimpleNamespace(glm_length=length))
    return SimpleNamespace(config=config)


def test_attention_by_hand_and_as_the_objective_has_it():
    # C = 4: the scores are cls . R / 2. Position 0 scores 2, the others 0: weights e^2 : 1, over the largest e^-2.
    dense = torch.zeros(4, 1, 3)
    dense[0, 0, 0] = 4.0
    cls = torch.tensor([1.0, 0, 0, 0])
    pupil = Pupil(None, Fixed(dense), trained_with(None), 0.0)
    found = attention(pupil, np.zeros((8, 8, 3), np.uint8), cls)
    assert found[0] == pytest.approx([1, np.exp(-2), np.exp(-2)])
    weights = torch.from_numpy(found / found.sum())
    assert torch.allclose(pooled(cls[None], dense[None])[0], (dense * weights).sum((1, 2)), atol=1e-6)
    half = Pupil(None, Fixed(dense), trained_with(0.5), 0.0)
    assert attention(half, np.zeros((8, 8, 3), np.uint8), cls)[0] == pytest.approx([1, np.exp(-1), np.exp(-1)])


def test_a_png_is_made_to_fit():
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8)
    content = fitted_png(Image.fromarray(noise))
    assert len(content) <= MAX_BYTES
    assert Image.open(io.BytesIO(content)).width < 900
    flat = Image.fromarray(np.full((900, 900, 3), 7, np.uint8))
    assert Image.open(io.BytesIO(fitted_png(flat))).size == (900, 900)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = tiny_config(tmp_path_factory.mktemp("figures"))
    make_cache(config)
    make_training(config)
    return config


def test_what_a_cache_has_is_drawn(run, capsys):
    written = draw_figures(run)
    assert [path.name for path in written] == ["attention.png", "predictions.png", "clusters.png"]
    for path in written:
        with Image.open(path) as picture:
            assert picture.width > 300
        assert path.stat().st_size < 300_000
    assert "cluster.debug" in capsys.readouterr().err  # why there is no figure of single centres
    html = Page(report(run)).html
    assert html.count('class="drawn"') == 2  # predictions are the page's gallery


def test_rows_with_several_objects_are_chosen(run):
    # The made-up view 0 has two objects in rows 1, 2, 4, 5, ...; row 0, 3, 6, ... have none.
    rows = telling_rows(Store.open(run.cache_path), {0, 1})
    assert len(rows) == 4
    assert all(row % 3 for row in rows)
    assert telling_rows(Store.open(run.cache_path), set()) == []


def test_single_centres_of_a_real_cache(cached_demo, tiny):
    config = tiny(f"cache.path={cached_demo}")
    drawn = {f.name: f for f in figures(Store.open(cached_demo), data_of(config.data), {0, 1}, None)}
    assert set(drawn) == {"centres", "clusters"}
    assert "purity by hidden class" in drawn["clusters"].caption
    picture = np.asarray(Image.open(io.BytesIO(drawn["centres"].png)).convert("RGB"))
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50  # pictures, not empty panels


def test_what_can_not_be_drawn_is_one_line(run, run_cli, tmp_path):
    bare = tiny_config(tmp_path)
    make_cache(bare, clustered=())
    with pytest.raises(MissingCache, match=r"cli\.py cluster"):
        draw_figures(bare)
    with pytest.raises(UserError, match=r"cli\.py report"):
        draw_figures(bare.model_copy(update={"recipe": "clip_es"}))
    done = run_cli("figures", run.run_path, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "attention.png").is_file()
    assert run_cli("figures", run.run_path, "--set", "train.lr=1").returncode == 2
