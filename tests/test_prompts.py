"""Sharpness-based prompt selection: by hand, image by image, and as a command on a cache."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from cache.store import Store
from pipeline.config import load
from pipeline.data.base import data_of
from pipeline.extract import extract
from pipeline.models.teacher import Teacher
from pipeline.ops.sharpness import sharpness
from pipeline.prompts import select_prompt
from pipeline.running.table import config_fingerprint
from tests.conftest import ROOT, is_one_line_error

TEXTURES = "[grass, sand, water, brick]"
SETTINGS = (
    "name=p",
    "recipe=clip_es",
    "cache.tokens=pooled",
    "data.train=12",
    "data.test=2",
    f"data.background={TEXTURES}",
    f"cams.background={TEXTURES}",
    f"text.synonyms={{background: {TEXTURES}}}",
)


def test_sharpness_by_hand():
    """One image, two classes and a background on the axes, scale ln 2.

    The feature is the first class: logits ln 2, 0, 0, softmax 1/2, 1/4, 1/4. Own scores 1/2 and 1/4: mean 3/8,
    variance 1/64, so 1/24. The second template calls both classes alike: 2/5, 2/5, 1/5, variance 0.
    """
    axes = torch.eye(3)
    classes = torch.stack([axes[:2], axes[[0, 0]]])  # (2, 2, 3)
    background = axes[2].expand(2, 1, 3)
    both = torch.tensor([[True, True]])
    found = sharpness(axes[:1], both, classes, background, math.log(2))
    assert torch.allclose(found, torch.tensor([1 / 24, 0.0], dtype=torch.float64), atol=1e-7)
    # An image with one class, and one with none, add nothing.
    more = torch.tensor([[True, True], [True, False], [False, False]])
    again = sharpness(axes[[0, 0, 0]], more, classes, background, math.log(2))
    assert torch.allclose(again, found)


def test_all_templates_at_once_are_one_image_and_template_at_a_time():
    torch.manual_seed(0)
    features, classes, background = (normalize(torch.randn(*shape), dim=-1) for shape in ((7, 8), (4, 5, 8), (4, 3, 8)))
    present = torch.rand(7, 5) < 0.5
    found = sharpness(features, present, classes, background, 20.0)
    for t in range(4):
        wanted = 0.0
        for image, own in zip(features, present, strict=True):
            names = torch.cat([classes[t, own], background[t]])
            scores = (20 * names @ image).softmax(0)[: int(own.sum())].double()
            wanted += float(scores.var(unbiased=False) / scores.mean()) if len(scores) else 0.0
        assert float(found[t]) == pytest.approx(wanted, rel=1e-5)


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    import os

    os.chdir(ROOT)
    config = load("config/demo.yaml", [f"runs={tmp_path_factory.mktemp('p')}", *SETTINGS])
    extract(config)
    return config


def arguments(config, *more):
    sets = (f"runs={config.runs}", *SETTINGS, *more)
    return ("prompts", *(word for setting in sets for word in ("--set", setting)))


def test_the_command(extracted, run_cli):
    """Two sentences that the tiny teacher was taught, one of strange words and the config's, ranked and drawn."""
    asked = ("a photo of a {}.", "a {}", "the quarterly report mentions {} twice")
    options = [word for template in asked for word in ("--templates", template)]
    done = run_cli(*arguments(extracted), *options)
    assert done.returncode == 0, done.stderr
    found = json.loads((extracted.run_path / "prompts.json").read_text())
    values = [entry["sharpness"] for entry in found["ranking"]]
    assert values == sorted(values)
    assert values[0] < values[-1]
    assert sorted(entry["template"] for entry in found["ranking"]) == sorted([*asked, "a clean origami {}."]), (
        "the config's own too"
    )
    assert found["winner"] == found["ranking"][0]["template"]
    data = data_of(extracted.data)
    several = sum(len(data.tags(sample)) > 1 for sample in data.samples("train"))
    assert (found["images"], found["with several classes"]) == (12, several)
    assert f'cams: {{template: "{found["winner"]}"}}' in done.stderr
    assert Image.open(extracted.run_path / "prompts.png").height == 5 * 20


def test_kept_tokens_give_the_same_ranking(extracted, tmp_path):
    """The mean of float16 or int8 tokens is what `pooled` keeps, up to their rounding."""
    asked = ["a photo of a {}.", "a {}", "itap of my {}."]
    select_prompt(extracted, asked)
    wanted = json.loads((extracted.run_path / "prompts.json").read_text())["ranking"]
    for kind in ("float16", "int8"):
        own = load("config/demo.yaml", [f"runs={tmp_path}/{kind}", *SETTINGS, f"cache.tokens={kind}"])
        extract(own)
        assert select_prompt(own, asked) == wanted[0]["template"]
        found = json.loads((own.run_path / "prompts.json").read_text())["ranking"]
        for one, other in zip(found, wanted, strict=True):
            assert one["sharpness"] == pytest.approx(other["sharpness"], rel=0.02)


def test_wrong_input(extracted, run_cli, tmp_path):
    assert is_one_line_error(run_cli(*arguments(extracted), "--templates", "clip8"), "unknown set 'clip8'", "clip80")
    wrong = ("--templates", "a photo", "--templates", "a {}")
    assert is_one_line_error(run_cli(*arguments(extracted), *wrong), "'a photo' must be text with exactly one {}")
    nowhere = arguments(extracted, f"runs={tmp_path}/none")
    assert is_one_line_error(run_cli(*nowhere), "`extract` has not been completed")
    one = tmp_path / "one"
    shutil.copytree(extracted.run_path, one / "p")
    alone = "data.background=[grass, sand, water, brick]"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.demo.DemoDataSet.tags", lambda self, sample: (3,))
        done = run_cli(*arguments(extracted, f"runs={one}", alone))
    assert is_one_line_error(done, "none of 12 images has two classes")


def test_synonyms_are_averaged_in_the_text_table(extracted):
    """The background's row is the mean of its names' features; without synonyms no fingerprint knows of them."""
    section = extracted.teacher
    teacher = Teacher.load(section.model, None, image_size=section.image_size)
    prompts = [f"a photo of a {name}." for name in ("grass", "sand", "water", "brick")]
    each = teacher.encode_text([[prompt] for prompt in prompts])
    row = Store.open(extracted.cache_path).read_whole("text")[0]
    assert np.allclose(row, normalize(each.mean(0), dim=0).numpy(), atol=1e-6)
    assert Store.open(extracted.cache_path).attributes["text"]["synonyms"] == {
        "background": ["grass", "sand", "water", "brick"]
    }
    plain = extracted.model_copy(update={"text": extracted.text.model_copy(update={"synonyms": {}})})
    assert config_fingerprint(plain, "text") != config_fingerprint(extracted, "text")
    assert config_fingerprint(plain, "extract") == config_fingerprint(extracted, "extract"), "the teacher's work stays"


def test_synonyms_of_no_class(tmp_path, run_cli):
    words = ("--set", f"runs={tmp_path}", "--set", "data.train=2", "--set", "text.synonyms={zebbra: [horse]}")
    assert is_one_line_error(run_cli("extract", *words), "text.synonyms: no class is called 'zebbra'", "'zebra'")
