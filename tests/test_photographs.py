"""Real photographs, ViT-B/16 at 512 x 512, random weights in OpenAI's layout: the whole way, on the CPU."""

import json

import numpy as np
import open_clip
import pytest
import torch

from cache.store import Store
from tests.conftest import ROOT, SHARED, is_one_line_error

pytestmark = pytest.mark.shared_data


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A checkpoint file as OpenAI published them: half precision, 14 x 14 positions, three extra entries."""
    torch.manual_seed(0)
    state = open_clip.create_model("ViT-B-16-quickgelu", load_weights=False).state_dict()
    extra = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
    path = tmp_path_factory.mktemp("weights") / "ViT-B-16.pt"
    torch.save({k: v.half() for k, v in state.items()} | {k: torch.tensor(v) for k, v in extra.items()}, path)
    return path


def options(tmp_path, weights, *settings):
    chosen = [
        f"runs={tmp_path}/runs",
        f"data.root={SHARED}/coco_stuff164k",
        "data.limit=2",
        f"teacher.pretrained={weights}",
        "teacher.quick_gelu=true",
        "teacher.batch=2",
        "views.num=1",
        f"text.features={SHARED}/clip_vit_b16/coco_multi.npy",
        "student.encoder=mit_b0",
        "student.encoder_weights=null",
        "student.options={decoder_segmentation_channels: 64}",
        "train.iterations=2",
        "train.batch=2",
        "train.precision=fp32",
        "train.workers=0",
        "train.log_every=1",
        *settings,
    ]
    return ["--config", ROOT / "config" / "coco_stuff.yaml", *(w for s in chosen for w in ("--set", s))]


def test_coco_stuff_runs_end_to_end(tmp_path, weights, run_cli):
    for stage in ("extract", "cluster", "train", "eval"):
        done = run_cli(stage, *options(tmp_path, weights, "cache.tokens=float16"))
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "coco_stuff"
    store = Store.open(run / "cache")
    tokens = store.read_rows("tokens", np.arange(2))
    assert tokens.shape == (2, 1, 32, 32, 512)
    assert np.isfinite(tokens).all()
    real = np.load(SHARED / "clip_vit_b16" / "coco_multi.npy").astype(np.float32)
    assert np.allclose(store.read_whole("text"), real, atol=2e-3)
    assert store.attributes["teacher"]["quick_gelu"] is True
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert len(metrics["per_class"]) == 171
    assert metrics["num_images"] == 2


def test_text_features_of_other_classes_are_refused(tmp_path, weights, run_cli):
    wrong = SHARED / "clip_vit_b16" / "voc12_single.npy"
    done = run_cli("extract", *options(tmp_path, weights, f"text.features={wrong}"))
    assert is_one_line_error(done, "(20, 512)", "(171, 512)")
