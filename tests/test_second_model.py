"""cluster.teacher: a second model for clustering alone, from its weights to labels; everything else stays CLIP's."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn.functional import adaptive_avg_pool2d

from bench.small_run import small_arguments
from cache.ledger import Ledger, read_manifest
from cache.store import Store
from cache.verify import verify
from pipeline.config import ConfigError, from_mapping
from pipeline.looking.forecast import forecast
from pipeline.models import second
from pipeline.models.second import second_encoder, second_shape
from pipeline.models.teacher import TeacherError, shape_asked
from pipeline.models.towers import FeatureTower
from pipeline.ops.views import replay_image
from pipeline.running.table import above, config_fingerprint, in_cache
from pipeline.teaching.encode import mean_colour
from tests.conftest import ROOT, is_one_line_error

SMALL = ("data.train=70", "student.options={decoder_segmentation_channels: 32}", "train.iterations=2")
MEAN = (0.5, 0.5, 0.5)


def weights_of(path, name="test_vit3", seed=0, **options):
    """A random checkpoint of timm's, with its classifier as published ones have it."""
    torch.manual_seed(seed)
    torch.save(timm.create_model(name, **options).state_dict(), path)
    return path


def section(name, path=None):
    return from_mapping({"cluster": {"teacher": f"timm:{name}", "teacher_weights": path and str(path)}}).cluster


def config_of(*settings):
    from pipeline.config import load

    return load(ROOT / "config" / "demo.yaml", settings)


# ---- tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "patch", "prefix"),
    [
        ("vit_small_patch14_dinov2", 14, 1),
        ("vit_small_patch14_reg4_dinov2", 14, 5),
        ("vit_small_patch16_dinov3", 16, 5),
        ("test_vit", 16, 1),
        ("test_convnext", 32, 0),
        ("resnet10t", 32, 0),
        ("swin_tiny_patch4_window7_224", 32, 0),
    ],
)
def test_tokens_are_the_last_feature_map_without_class_and_register_tokens(tmp_path, name, patch, prefix):
    model = second_encoder(section(name, weights_of(tmp_path / "w.pth", name)), 7, precision="fp32", device="cpu")
    assert (model.patch, model.image_size, model.side) == (patch, 7 * patch, 7)
    images = torch.randint(0, 256, (2, 3, 7 * patch, 7 * patch), dtype=torch.uint8)
    own = timm.create_model(name, num_classes=0).eval()
    state = {k: v for k, v in torch.load(tmp_path / "w.pth").items() if k in own.state_dict()}
    own.load_state_dict(state)
    if hasattr(own, "set_input_size"):
        own.set_input_size((7 * patch, 7 * patch))
    config = own.pretrained_cfg
    pixels = (images / 255 - torch.tensor(config["mean"]).view(3, 1, 1)) / torch.tensor(config["std"]).view(3, 1, 1)
    with torch.inference_mode():
        features = own.forward_features(pixels)
    if features.ndim == 3:
        assert features.shape[1] == prefix + 49
        wanted = torch.stack([features[:, prefix + 7 * row : prefix + 7 * row + 7] for row in range(7)], 1)
    else:
        wanted = features if name.startswith("swin") else features.permute(0, 2, 3, 1)
    assert torch.allclose(model.encode(images)[1], wanted, atol=1e-5)
    shape = second_shape(section(name), 7)
    assert (shape.channels, shape.patch, shape.image_size) == (wanted.shape[-1], patch, 7 * patch)
    assert shape.flops > 1e6


class MeanColour(torch.nn.Module):
    """Patches of 14 pixels, each token their mean colour."""

    def __init__(self):
        super().__init__()
        self.feature_info = [{"reduction": 14}]
        self.pretrained_cfg = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3, "input_size": (3, 224, 224)}

    def forward_features(self, pixels):
        return adaptive_avg_pool2d(pixels, pixels.shape[-1] // 14)


def test_its_tokens_lie_where_the_teacher_s_do(monkeypatch):
    """8 x 8 tokens of the teacher's 16 pixels beside those of 14: each sees the same eighth of the view's box."""
    monkeypatch.setattr(second, "_built", lambda section, is_downloaded=False: MeanColour())
    model = second_encoder(section("mean"), 8, precision="fp32", device="cpu")
    assert model.image_size == 112
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8).repeat(24, 0).repeat(24, 1)
    for box in ([0, 0, 384, 384], [48, 96, 240, 288], [-96, -96, 288, 288]):
        colour = mean_colour(MEAN)
        seen = model.encode(replay_image(image, box, model.image_size, colour)[None])[1][0]
        view = replay_image(image, box, 8 * 16, colour).float()
        wanted = adaptive_avg_pool2d(view, 8).permute(1, 2, 0)
        assert (seen - wanted).abs().mean() < 2  # of 255: antialiasing reaches over a token's edge
        assert (seen - wanted.roll(1, 0)).abs().mean() > 20


# ---- weights -------------------------------------------------------------------------------------------


def test_weights_as_published_fill_it(tmp_path):
    """A folder as the hub has it, a training checkpoint; of either the classifier is left out."""
    (tmp_path / "hub").mkdir()
    one = weights_of(tmp_path / "hub" / "pytorch_model.bin")
    torch.save({"state_dict": {f"module.{k}": v for k, v in torch.load(one).items()}}, tmp_path / "w.pt")
    found = [
        second_encoder(section("test_vit3", path), 4, precision="fp32", device="cpu").provenance["weights_sha256"]
        for path in (one, tmp_path / "hub", tmp_path / "w.pt")
    ]
    assert len({*found}) == 1
    assert all(value.is_floating_point() for value in torch.load(one).values())


@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"])
def test_weights_as_their_authors_name_them_fill_it(tmp_path, capsys, name):
    """Registers, mask token and positions of DINOv2 and DINOv3 as in their own files."""
    weights_of(tmp_path / "timm.pth", name)
    state = torch.load(tmp_path / "timm.pth")
    state["mask_token"] = torch.zeros(1, 384)
    if name.endswith("dinov2"):  # positions of CLS too, which timm adds to the token
        of_cls = torch.full((1, 1, 384), 0.25)
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([of_cls, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - of_cls
    else:
        state["storage_tokens"] = state.pop("reg_token")
        state["rope_embed.periods"] = torch.ones(16)
        for block in range(12):
            state[f"blocks.{block}.attn.qkv.bias"] = torch.zeros(3 * 384)
            for number in (1, 2):
                state[f"blocks.{block}.ls{number}.gamma"] = state.pop(f"blocks.{block}.gamma_{number}")
    torch.save(state, tmp_path / "own.pth")
    images = torch.randint(0, 256, (1, 3, *2 * [4 * int(name.partition("patch")[2][:2])]), dtype=torch.uint8)
    both = [
        second_encoder(section(name, tmp_path / file), 4, precision="fp32", device="cpu").encode(images)[1]
        for file in ("timm.pth", "own.pth")
    ]
    assert torch.allclose(*both, atol=1e-5)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("name", "made", "words"),
    [
        ("test_vit3", "test_vit", "doesn't fit the model: it .*another shape of"),
        ("test_vit", "resnet10t", "it lacks cls_token"),
        ("resnet10t", "resnet14t", "also holds layer1.0.conv3.weight"),
        ("nosuchmodel", "test_vit", "timm knows no such model; near it are"),
        ("test_vit3", None, "no such file"),
        ("levit_128s", "levit_128s", "no dense tokens that are sound"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, name, made, words):
    path = tmp_path / "w.pth"
    if made:
        weights_of(path, made)
    with pytest.raises(TeacherError, match=words) as error:
        second_encoder(section(name, path), 7, precision="fp32", device="cpu")
    assert "\n" not in str(error.value)


def test_numbers_that_are_not_finite_and_an_empty_folder(tmp_path):
    state = torch.load(weights_of(tmp_path / "w.pth"))
    state["norm.weight"][0] = torch.nan
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(TeacherError, match=r"norm.weight holds numbers that are not finite"):
        second_encoder(section("test_vit3", tmp_path / "w.pth"), 4, precision="fp32", device="cpu")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TeacherError, match="the folder holds no weights"):
        second_shape(section("test_vit3", tmp_path / "empty"), 4)


def test_without_a_network_and_without_a_file(tmp_path):
    """A process of its own: the hub's client looks at its surroundings when it is imported."""
    words = [sys.executable, "cli.py", "encode", *small_arguments(tmp_path, *SMALL, "cluster.teacher=timm:test_vit3")]
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    subprocess.run([*words[:2], "extract", *words[3:]], cwd=ROOT, env=env, check=True, timeout=200)
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert is_one_line_error(done, "cluster.teacher 'timm:test_vit3'", "cluster.teacher_weights")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"teacher": "vit_small_patch14_dinov2"}, "want timm:<name>"),
        ({"teacher": "timm:"}, "want timm:<name>"),
        ({"teacher_weights": "w.pth"}, "cluster.teacher, which is null"),
    ],
)
def test_keys_that_can_not_be_meant(keys, words):
    with pytest.raises(ConfigError, match=words):
        from_mapping({"cluster": keys})


# ---- the table -----------------------------------------------------------------------------------------


def test_off_it_is_in_no_run_and_no_fingerprint():
    off, on = config_of(), config_of("cluster.teacher=timm:test_vit3")
    assert in_cache(off) == ("extract", "cluster")
    assert in_cache(on) == ("extract", "encode", "cluster")
    assert above(on, "cluster") == "encode"
    assert config_fingerprint(off, "extract") == config_fingerprint(on, "extract")
    for stage in ("encode", "cluster", "train"):
        assert config_fingerprint(off, stage) != config_fingerprint(on, stage)
    finer = config_of("cluster.teacher=timm:test_vit3", "cluster.threshold=0.7")
    assert config_fingerprint(finer, "encode") == config_fingerprint(on, "encode")
    assert in_cache(config_of("cluster.teacher=timm:test_vit3", "cache.tokens=stream")) == ("extract", "cluster")
    assert config_fingerprint(off, "cluster") == config_fingerprint(config_of("cluster.teacher=null"), "cluster")


# ---- a run ---------------------------------------------------------------------------------------------


def digests(config_path: Path, stage: str):
    return {s: entry["digests"] for s, entry in Ledger(config_path, stage).entries().items()}


def test_a_run(tmp_path, run_cli):
    """Extract, encode, cluster, train, eval; what a change makes again, and what it leaves as it is."""
    one, other = weights_of(tmp_path / "one.pth"), weights_of(tmp_path / "other.pth", "test_convnext")
    plain = small_arguments(tmp_path, *SMALL)
    asked = [*plain, "--set", "cluster.teacher=timm:test_vit3", "--set", f"cluster.teacher_weights={one}"]
    cache = tmp_path / "runs" / "small" / "cache"
    for stage in ("extract", "cluster"):
        assert run_cli(stage, *plain).returncode == 0
    teacher, without = digests(cache, "extract"), Store.open(cache).read_whole("pseudo")
    assert is_one_line_error(run_cli("encode", *plain), "nothing to encode: cluster.teacher is null")
    assert "nothing to do" in run_cli("extract", *asked).stderr
    assert is_one_line_error(run_cli("cluster", *asked), "`encode` has not been completed", "`cli.py encode` first")
    assert is_one_line_error(
        run_cli("train", *asked), "cluster was run with another config", "cluster.teacher was None"
    )
    assert "encode: 140 views" in run_cli("encode", *asked).stderr
    for stage in ("cluster", "train", "eval", "verify"):
        done = run_cli(stage, *asked)
        assert done.returncode == 0, done.stderr
    store = Store.open(cache)
    assert store.sizes["C_c"] == 96 != store.sizes["C"]
    kept, with_it = store.read_whole("cluster_tokens"), store.read_whole("pseudo")
    assert kept.shape == (70, 2, 8, 8, 96)
    assert digests(cache, "extract") == teacher
    assert (with_it != without).any()
    assert ((with_it == 0) == (without == 0)).all()  # where there is a label
    assert store.attributes["encode"]["patch"] == 16
    assert store.attributes["encode"]["image_size"] == 8 * 16
    # A literal copy of one row: box, own size, own normalisation.
    from pipeline.data.base import data_of
    from pipeline.running.rows import current_samples

    config = config_of(*asked[3::2])
    data = data_of(config.data)
    model = second_encoder(config.cluster, 8, precision="fp32", device="cpu")
    image, box = data.image(current_samples(data, store)[66]), store.read_rows("view", [66])[0][1]
    view = replay_image(image, box, 128, np.array([128, 128, 128], np.uint8))
    assert np.abs(model.encode(view[None])[1][0].numpy() - kept[66, 1]).max() < 4e-3 * np.abs(kept[66, 1]).max()
    # Looked at: inspect, its shard, doctor, which forecasts the bytes that there are.
    said = run_cli("inspect", str(tmp_path / "runs" / "small")).stdout
    assert "cluster_tokens" in said
    assert "timm:test_vit3" in said
    assert "encode  2 of 2 shards, complete" in said
    assert "encode" in run_cli("inspect", str(tmp_path / "runs" / "small"), "--shard", "1").stdout
    done = run_cli("doctor", *asked)
    assert "cluster.teacher: timm:test_vit3 at 128 x 128, 8 x 8 tokens of 96" in done.stderr + done.stdout
    cost = forecast(config, shape_asked(config.teacher), 70, 20, "float16", second_shape(config.cluster, 8))
    assert cost.arrays["cluster_tokens"] == pytest.approx(store.size_bytes("cluster_tokens"), rel=2e-3)
    # Another clustering finds the tokens, another model leaves the teacher's.
    finer = [*asked, "--set", "cluster.threshold=0.7"]
    assert "nothing to do" in run_cli("encode", *finer).stderr
    assert run_cli("cluster", *finer).returncode == 0
    changed = [*plain, "--set", "cluster.teacher=timm:test_convnext", "--set", f"cluster.teacher_weights={other}"]
    assert is_one_line_error(run_cli("cluster", *changed), "encode was run with another config")
    for stage in ("extract", "encode", "cluster", "verify"):
        done = run_cli(stage, *changed)
        assert done.returncode == 0, done.stderr
        assert ("nothing to do" in done.stderr) == (stage == "extract")
    store = Store.open(cache)
    assert store.read_whole("cluster_tokens").shape == (70, 2, 8, 8, store.sizes["C_c"])
    assert digests(cache, "extract") == teacher
    # The same name and other weights in the file: told by its bytes.
    first = read_manifest(cache / "encode.manifest.json")
    weights_of(tmp_path / "other.pth", "test_convnext", seed=1)
    assert "nothing to do" not in run_cli("encode", *changed).stderr
    assert read_manifest(cache / "encode.manifest.json")["fingerprint"] != first["fingerprint"]
    assert is_one_line_error(run_cli("train", *changed), "cluster")  # its labels are of the old ones
    # Damage to them is found.
    file = next((cache / "data.zarr" / "cluster_tokens").glob("c.1.*"))
    file.write_bytes(file.read_bytes()[:-9] + bytes(9))
    assert any("cluster_tokens" in str(finding) for finding in verify(cache))
    assert run_cli("cluster", *changed).returncode == 2
    # And off again.
    assert run_cli("cluster", *plain).returncode == 0
    assert (Store.open(cache).read_whole("pseudo") == without).all()


@pytest.mark.parametrize("tokens", ["int8", "stream"])
def test_however_tokens_are_kept(tmp_path, run_cli, tokens):
    """Streamed ones end in the labels of kept ones, bit for bit; int8 in nearly these."""
    one, found = weights_of(tmp_path / "one.pth"), {}
    for kept in ("float16", tokens):
        keys = (
            "cluster.teacher=timm:test_vit3",
            f"cluster.teacher_weights={one}",
            f"cache.tokens={kept}",
            f"name={kept}",
        )
        asked = small_arguments(tmp_path, *SMALL, *keys)
        for stage in ("extract", *(() if kept == "stream" else ("encode",)), "cluster", "verify"):
            done = run_cli(stage, *asked)
            assert done.returncode == 0, done.stderr
        store = Store.open(tmp_path / "runs" / kept / "cache")
        found[kept] = store.read_whole("pseudo")
        assert store.attributes["encode"]["model"] == "timm:test_vit3"
    if tokens == "stream":
        assert not store.has("cluster_tokens")
        assert (found["stream"] == found["float16"]).all()
        assert is_one_line_error(run_cli("encode", *asked), "cache.tokens is stream")
        weights_of(one, seed=1)
        assert is_one_line_error(run_cli("extract", *asked), "the SHA-256 of the weights of cluster.teacher was")
    else:
        assert store.read_shard("cluster_tokens", 0).dtype == np.int8
        assert store.has("cluster_token_scale")
        assert ((found["int8"] == 0) == (found["float16"] == 0)).all()


def test_new_images(tmp_path, run_cli):
    """A data set that grows: only the shard with new rows is made again."""
    one = weights_of(tmp_path / "one.pth")
    keys = ("cluster.teacher=timm:test_vit3", f"cluster.teacher_weights={one}")
    for num in (70, 72):
        asked = small_arguments(tmp_path, *SMALL, *keys, f"data.train={num}")
        for stage in ("extract", "encode", "cluster", "verify"):
            done = run_cli(stage, *asked)
            assert done.returncode == 0, done.stderr
            if (num, stage) == (72, "encode"):
                assert "resuming, 64 of 72 images are done" in done.stderr
    assert Store.open(tmp_path / "runs" / "small" / "cache").read_whole("cluster_tokens").shape[0] == 72


def test_another_cache_takes_its_tokens_over(tmp_path, run_cli):
    """By --like, as the teacher's; not those of another model, and none where none are asked for."""
    one = weights_of(tmp_path / "one.pth")
    keys = ("cluster.teacher=timm:test_vit3", f"cluster.teacher_weights={one}")
    first = tmp_path / "runs" / "small" / "cache"
    for stage in ("extract", "encode"):
        assert run_cli(stage, *small_arguments(tmp_path, *SMALL, *keys)).returncode == 0
    asked = small_arguments(tmp_path, *SMALL, *keys, "name=finer", "cluster.threshold=0.7")
    done = run_cli("extract", *asked, "--like", first)
    assert "takes over the extraction" in done.stderr
    for stage, is_done in (("extract", True), ("encode", True), ("cluster", False), ("verify", False)):
        done = run_cli(stage, *asked)
        assert done.returncode == 0, done.stderr
        assert ("nothing to do" in done.stderr) == is_done
    place = "cache/data.zarr/cluster_tokens/c.0.0.0.0.0"
    assert (tmp_path / "runs" / "finer" / place).samefile(tmp_path / "runs" / "small" / place)
    for name, more in (("without", ()), ("other", (*keys[1:], "cluster.teacher=timm:test_vit2"))):
        asked = small_arguments(tmp_path, *SMALL, *more, f"name={name}")
        assert run_cli("extract", *asked, "--like", first).returncode == 0
        assert not Store.open(tmp_path / "runs" / name / "cache").has("cluster_tokens")


def test_snakemake_plans_it(tmp_path):
    one = weights_of(tmp_path / "one.pth")
    given = f"set=runs={tmp_path}/runs cluster.teacher=timm:test_vit3 cluster.teacher_weights={one}"
    words = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", "--config"]
    done = subprocess.run([*words, given], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "rule encode:" in done.stdout, done.stderr
    assert done.stdout.index("rule extract:") < done.stdout.index("rule encode:") < done.stdout.index("rule cluster:")
    done = subprocess.run([*words, f"set=runs={tmp_path}/runs"], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert "rule encode:" not in done.stdout
    assert "rule cluster:" in done.stdout


def test_towers_of_timm_without_a_stride_say_so():
    with pytest.raises(TeacherError, match="timm doesn't say its stride"):
        FeatureTower(torch.nn.Identity())
