"""Teachers that are no ViT of open_clip's, from photographs to scores: extract, cluster, train, eval; and no CAMs."""

import json

import numpy as np
import pytest
import timm
import torch

from cache.store import Store
from tests.conftest import ROOT, SHARED, is_one_line_error
from tests.test_teacher_towers import folder_of, timm_

pytestmark = pytest.mark.shared_data

# name -> image tower, joint space, the config's further settings, tokens a side of a view of 96 pixels
TEACHERS = {
    "convnext": (timm_("test_convnext", 96), 32, ["teacher.output_stride=16"], 6),
    "siglip": (timm_("vit_base_patch16_siglip_224", 224, pool="map", proj="none"), 768, [], 6),
    "averaged": (timm_("resnet10t", 96), 32, ["teacher.output_stride=8"], 12),
    "efficientnet": (timm_("tf_efficientnet_lite0", 96), 32, ["teacher.output_stride=16"], 6),
    "qq": (
        {"image_size": 48, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        32,
        ["teacher.dense=qq"],
        12,
    ),
}


def words(runs, teacher, *settings):
    chosen = [
        f"runs={runs}",
        f"data.root={SHARED}/voc_photos",
        "data.limit=12",
        f"teacher.model={teacher}",
        "teacher.pretrained=null",
        "teacher.image_size=96",
        "teacher.batch=12",
        "views.num=2",
        "student.encoder=tu-resnet10t",
        "student.encoder_weights=null",
        "student.options={decoder_segmentation_channels: 32}",
        "train.iterations=3",
        "train.batch=4",
        "train.precision=fp32",
        "train.workers=0",
        "cluster.sizes=[3]",
        "eval.pictures=0",
        *settings,
    ]
    return ["--config", ROOT / "config" / "voc.yaml", *(w for setting in chosen for w in ("--set", setting))]


@pytest.mark.parametrize("kind", TEACHERS)
def test_from_photographs_to_scores(tmp_path, run_cli, kind):
    vision, dim, settings, side = TEACHERS[kind]
    asked = words(tmp_path / "runs", folder_of(tmp_path / "t", vision, dim), *settings)
    assert f"{side} x {side} tokens of {dim}" in run_cli("doctor", *asked).stderr
    for stage in ("extract", "cluster", "train", "eval"):
        done = run_cli(stage, *asked)
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "voc"
    store = Store.open(run / "cache")
    tokens = store.read_rows("tokens", np.arange(12)).astype(np.float32)
    assert tokens.shape == (12, 2, side, side, dim)
    assert np.isfinite(tokens).all()
    if kind in ("averaged", "efficientnet"):
        pooled = store.read_rows("cls", np.arange(12)).astype(np.float32)
        assert np.abs(tokens.mean((2, 3)) - pooled).max() < 2e-3 * np.abs(tokens).max()  # float16
    assert store.attributes["teacher"]["patch"] == 96 // side
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["num_images"] == 12
    done = run_cli("extract", *asked)
    assert "nothing to do" in done.stderr
    if kind == "qq":  # part of the fingerprint
        assert "q" in store.attributes["teacher"]["dense"]
        done = run_cli("extract", *words(tmp_path / "runs", f"local-dir:{tmp_path}/t"))
        assert is_one_line_error(done, "teacher.dense was 'qq' and is 'paper'")


def test_a_second_model_s_tokens_are_clustered(tmp_path, run_cli):
    """A teacher of 32 pixels a token beside a ViT of 14: both on 8 x 8 tokens."""
    torch.manual_seed(0)
    torch.save(timm.create_model("vit_small_patch14_reg4_dinov2").state_dict(), tmp_path / "w.pth")
    name = folder_of(tmp_path / "t", timm_("test_convnext", 96), 32)
    second = ["cluster.teacher=timm:vit_small_patch14_reg4_dinov2", f"cluster.teacher_weights={tmp_path}/w.pth"]
    asked = words(tmp_path / "runs", name, *second, "teacher.image_size=256", "cache.tokens=int8")
    assert "at 112 x 112, 8 x 8 tokens of 384" in run_cli("doctor", *asked).stderr
    for stage in ("extract", "encode", "cluster", "train", "eval", "verify"):
        done = run_cli(stage, *asked)
        assert done.returncode == 0, done.stderr
    store = Store.open(tmp_path / "runs" / "voc" / "cache")
    assert store.read_rows("cluster_tokens", [0]).shape == (1, 2, 8, 8, 384)
    assert store.read_rows("tokens", [0]).shape == (1, 2, 8, 8, 32)
    assert store.attributes["encode"]["mean"] == [0.485, 0.456, 0.406]


def test_a_teacher_without_cams_says_which_have(tmp_path, run_cli):
    name = folder_of(tmp_path / "t", timm_("test_convnext", 96), 32)
    settings = ["recipe=clip_es", "data.background=true", "data.tags=masks", "data.split=null", "cache.tokens=pooled"]
    asked = words(tmp_path / "runs", name, *settings)
    done = run_cli("doctor", *asked)
    assert done.returncode == 2
    assert "no CAMs: recipe clip_es makes CAMs" in done.stdout
    refused = ("CAMs need attention and gradients", "These do: open_clip's own ViTs")
    assert is_one_line_error(run_cli("extract", *asked), *refused)  # at its start
    assert not (tmp_path / "runs").exists()
    photograph = next((SHARED / "voc_photos" / "JPEGImages").iterdir())
    picture = ["--text", "a dog", "--image", photograph, "--out", tmp_path / "dog.png"]
    assert is_one_line_error(run_cli("cams", *asked, *picture), *refused)
    # The same extraction, asked for by a recipe without CAMs.
    assert run_cli("extract", *words(tmp_path / "runs", name, *settings[1:-1], "cache.tokens=float16")).returncode == 0
    asked = words(tmp_path / "runs", name, *settings[:-1], "cache.tokens=float16")
    assert is_one_line_error(run_cli("cams", *asked), *refused)
    asked = words(tmp_path / "runs", name, *settings[1:-1], "cache.tokens=float16", "cluster.named_above=0.3")
    assert is_one_line_error(run_cli("cluster", *asked), *refused)
