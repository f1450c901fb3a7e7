"""Every kind of image tower: its global token is open_clip's, its dense tokens are what its head makes of a place."""

import json
import shutil

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch.nn.functional import linear, softmax

from bench.small_run import small_arguments
from pipeline import extract
from pipeline.config import TeacherSection
from pipeline.models.clip import describe, seen_by, unlike_openai
from pipeline.models.explain import explain
from pipeline.models.teacher import Teacher, TeacherError, located, shape_of
from pipeline.models.towers import tower_of
from tests.conftest import ROOT, is_one_line_error

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
HALVES = {"mean": [0.5] * 3, "std": [0.5] * 3}
POOLED = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 2}


def timm_(name, image_size=64, pool="avg", proj="linear"):
    return {"timm_model_name": name, "timm_pool": pool, "timm_proj": proj, "image_size": image_size}


TOWERS = {
    "tok": VIT,
    "tok, norm after": VIT | {"final_ln_after_pool": True},
    "avg": VIT | {"pool_type": "avg"},
    "avg, norm after": VIT | {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True},
    "none": VIT | {"pool_type": "none"},
    "layer scale": VIT | {"ls_init_value": 0.5},
    "attention pooling": VIT | POOLED,
    "attention pooling, cascade": VIT | POOLED | {"attentional_pool": "cascade"},
    "attention pooling, parallel": VIT | POOLED | {"attentional_pool": "parallel"},
    "ResNet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
    "convnext": timm_("test_convnext"),
    "convnext, mlp": timm_("test_convnext", proj="mlp"),
    "resnet": timm_("resnet10t"),
    "resnet, attention": timm_("resnet10t", pool="rot_attn", proj=""),
    "efficientnet": timm_("test_efficientnet"),
    "fastvit": timm_("fastvit_t8", proj=None),
    "vit": timm_("test_vit", 160, pool="token", proj=None),
    "vit, relpos": timm_("test_vit_relpos", 160, pool="avg"),
    "siglip": timm_("vit_base_patch16_siglip_224", 224, pool="map", proj="none"),
    "eva": timm_("eva02_tiny_patch14_224", 224, pool="token", proj=None),
    "swin": timm_("swin_tiny_patch4_window7_224", 224, proj=None),
}
# SigLIP has no projection; of two poolings open_clip norms the tower's width by the joint space's.
DIMS = {"siglip": 768, "attention pooling, cascade": 32, "attention pooling, parallel": 32}
# Where nothing but a linear map follows an average.
AVERAGED = ("avg", "resnet", "efficientnet", "fastvit", "swin")


def folder_of(folder, vision, embed_dim=16, **more):
    """A folder with a random model, as the hub has them; returns its name."""
    config = {"embed_dim": embed_dim, "vision_cfg": dict(vision), "text_cfg": TEXT, "custom_text": True, **more}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for value in model.visual.parameters():  # BatchNorm and LayerNorm otherwise begin as nothing
        if value.ndim == 1:
            torch.nn.init.normal_(value, 0.5, 0.3)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def images_of(size, num=2):
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", TOWERS)
def test_a_tower_s_global_token_is_open_clip_s_and_its_tokens_lie_in_the_same_space(tmp_path, kind):
    vision = TOWERS[kind]
    dim = DIMS.get(kind, 16)
    name = folder_of(tmp_path / "t", vision, dim)
    teacher = Teacher.load(name, image_size=None)
    images = images_of(vision["image_size"])
    pooled, tokens = teacher.encode(images)
    own = open_clip.create_model(name).eval()
    with torch.inference_mode():
        wanted = own.encode_image(teacher.normalised(images))
    assert torch.allclose(pooled, wanted[:, 0] if wanted.ndim == 3 else wanted, atol=1e-5)
    assert tokens.shape == (2, teacher.side, teacher.side, teacher.channels) == (2, *tokens.shape[1:3], dim)
    assert tokens.flatten(1, 2).var(1).min() > 0  # places differ
    if kind in AVERAGED:
        assert torch.allclose(tokens.mean((1, 2)), pooled, atol=1e-5)
    assert teacher.can_explain == (
        vision is VIT or ("layers" in vision and kind != "ResNet" and "attention" not in kind)
    )
    shape = shape_of(name, None)
    assert (shape.patch, shape.channels, shape.can_explain) == (teacher.patch, dim, teacher.can_explain)
    assert shape.flops > 0


def test_attention_pooling_over_one_place_is_its_value(tmp_path):
    """SigLIP's: the literal pool of a single token; ResNet's: the literal values without positions."""
    teacher = Teacher.load(folder_of(tmp_path / "s", TOWERS["siglip"], 768), image_size=64)  # interpolated
    pixels = teacher.normalised(images_of(64, 1))
    trunk = teacher.model.visual.trunk
    with torch.inference_mode():
        features = trunk.forward_features(pixels)
        wanted = torch.stack([trunk.attn_pool(features[:, i : i + 1])[0] for i in range(16)])
        assert torch.allclose(teacher.tower(pixels)[1].flatten(0, 2), wanted, atol=1e-5)
    teacher = Teacher.load(folder_of(tmp_path / "r", TOWERS["ResNet"]), image_size=96)
    assert len(teacher.model.visual.attnpool.positional_embedding) == 1 + 3 * 3
    with torch.inference_mode():
        pixels = teacher.normalised(images_of(96, 1))
        visual = teacher.model.visual
        features = visual.forward_intermediates(pixels)["image_intermediates"][-1]
        pool = visual.attnpool
        place = linear(linear(features[0, :, 1, 2], pool.v_proj.weight, pool.v_proj.bias), pool.c_proj.weight)
        assert torch.allclose(teacher.tower(pixels)[1][0, 1, 2], place + pool.c_proj.bias, atol=1e-5)


def test_attention_pooling_of_a_vit_is_the_mean_of_values_where_queries_see_all_alike(tmp_path):
    """CoCa's: with keys of nothing each query averages, so before the norm the pooled token is the values' mean."""
    teacher = Teacher.load(folder_of(tmp_path / "c", TOWERS["attention pooling"]), image_size=32)
    visual = teacher.model.visual
    visual.attn_pool.attn.k_proj_weight.zero_()
    visual.attn_pool.attn.in_proj_bias.zero_()
    visual.ln_post = torch.nn.Identity()
    pixels = teacher.normalised(images_of(32, 1))
    with torch.inference_mode():
        pooled, tokens = teacher.tower(pixels)
        everything = visual.transformer(visual._embeds(pixels))
        cls = teacher.tower._projected(teacher.tower._head(everything[:, :1]))[:, 0]
        assert torch.allclose((tokens.sum((1, 2)) + cls) / 17, pooled, atol=1e-5)


@pytest.mark.parametrize("dense", ["value", "qq", "naclip"])
@pytest.mark.parametrize("kind", ["tok", "avg", "layer scale"])
def test_recomputed_last_blocks_are_their_papers_formulas(tmp_path, kind, dense):
    """Written out a head and a token at a time."""
    name = folder_of(tmp_path / "t", TOWERS[kind])
    plain, teacher = Teacher.load(name, image_size=32), Teacher.load(name, image_size=32, dense=dense)
    images = images_of(32, 1)
    pooled, tokens = teacher.encode(images)
    assert torch.equal(pooled, plain.encode(images)[0])  # always of the ordinary pass
    assert teacher.provenance["dense"] != plain.provenance["dense"]
    with torch.inference_mode():
        visual = teacher.model.visual
        x = visual._embeds(teacher.normalised(images))
        x = visual.transformer.resblocks[0](x)[0]  # (17, 32)
        block = visual.transformer.resblocks[1]
        y = block.ln_1(x)
        q, k, v = (y @ w.T + b for w, b in zip(*(p.chunk(3) for p in (
            block.attn.in_proj_weight, block.attn.in_proj_bias)), strict=True))  # fmt: skip
        heads = []
        for h in range(2):
            qh, kh, vh = (m[:, 16 * h : 16 * h + 16] for m in (q, k, v))
            if dense == "value":
                heads.append(vh)
                continue
            scores = (qh @ qh.T if dense == "qq" else kh @ kh.T) / 16**0.5
            if dense == "naclip":
                for i in range(16):
                    for j in range(16):
                        apart = (i // 4 - j // 4) ** 2 + (i % 4 - j % 4) ** 2
                        scores[1 + i, 1 + j] += torch.exp(torch.tensor(-apart / (2 * 5**2)))
            heads.append(softmax(scores, -1) @ vh)
        out = block.ls_1(torch.cat(heads, 1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias)
        if dense == "value":
            u = x + out
            out = u + block.ls_2(block.mlp(block.ln_2(u)))
        wanted = visual.ln_post(out)[1:] @ visual.proj
    assert torch.allclose(tokens.flatten(0, 2), wanted, atol=1e-5)
    assert not torch.allclose(tokens, plain.encode(images)[1], atol=1e-3)


def test_a_cnn_s_stride_is_an_option_with_the_same_weights(tmp_path):
    name = folder_of(tmp_path / "t", TOWERS["convnext"])
    own, fine = (Teacher.load(name, image_size=64, output_stride=stride) for stride in (None, 8))
    assert (own.patch, fine.patch) == (32, 8)
    assert fine.encode(images_of(64))[1].shape == (2, 8, 8, 16)
    assert own.provenance["weights_sha256"] == fine.provenance["weights_sha256"]
    assert shape_of(name, None, image_size=64, output_stride=8).patch == 8


# What each head does to one place, written out.
HEADS = {
    "vit": lambda trunk, x: trunk.head(trunk.fc_norm(x)),
    "eva": lambda trunk, x: trunk.head(trunk.fc_norm(x)),
    "convnext": lambda trunk, x: torch.nn.functional.layer_norm(
        x, x.shape[-1:], trunk.head.norm.weight, trunk.head.norm.bias, trunk.head.norm.eps
    ),
    "resnet": lambda trunk, x: x,
    "efficientnet": lambda trunk, x: x,
    "fastvit": lambda trunk, x: trunk.head.fc(x),
    "swin": lambda trunk, x: trunk.head.fc(x),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_timm_tower_s_head_is_run_on_each_place(tmp_path, kind):
    teacher = Teacher.load(folder_of(tmp_path / "t", TOWERS[kind]), image_size=None)
    pixels, visual = teacher.normalised(images_of(TOWERS[kind]["image_size"], 1)), teacher.model.visual
    with torch.inference_mode():
        features = visual.trunk.forward_features(pixels)[0]
        if features.ndim == 2:
            places = features[-(teacher.side**2) :]
        else:
            places = features.flatten(0, 1) if kind == "swin" else features.flatten(1).T
        wanted = visual.head(torch.stack([HEADS[kind](visual.trunk, place) for place in places]))
        assert torch.allclose(teacher.tower(pixels)[1].flatten(0, 2), wanted, atol=1e-5)


def test_a_tower_without_projection(tmp_path):
    """Its tokens are of the tower's own width, and CAMs are of them, too."""
    teacher = Teacher.load(folder_of(tmp_path / "t", VIT, 32), image_size=32)
    images, visual = images_of(32), teacher.model.visual
    visual.proj = None
    with torch.inference_mode():
        leaving = visual.transformer(visual._embeds(teacher.normalised(images)))
        pooled, tokens = tower_of(visual)(teacher.normalised(images))
        assert torch.allclose(pooled, visual(teacher.normalised(images)), atol=1e-6)
        assert torch.allclose(tokens.flatten(1, 2), visual.ln_post(leaving[:, 1:]), atol=1e-6)
    assert tokens.shape == (2, 4, 4, 32)
    features = torch.nn.functional.normalize(torch.randn(3, 32), dim=1)
    found = explain(teacher, images, features[None, :2].expand(2, 2, 32), torch.ones(2, 2).bool(), features[2:], 2)
    assert found.gradients.abs().max() > 0


def test_a_small_clip_over_timm_s_efficientnet(tmp_path):
    """An open_clip CLIP of one's own, as open_clip builds and saves it: a folder with its config and its weights."""
    vision = timm_("tf_efficientnet_lite0", 64)
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT}, "preprocess_cfg": HALVES})
    )
    name = f"local-dir:{tmp_path}"
    torch.manual_seed(0)
    model = open_clip.create_model(name, load_weights=False).eval()
    assert type(model) is open_clip.CLIP
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    teacher = Teacher.load(name, image_size=96, output_stride=8)
    assert (teacher.side, teacher.channels, teacher.mean) == (12, 24, (0.5, 0.5, 0.5))
    pooled, tokens = teacher.encode(images_of(96))
    assert torch.allclose(tokens.mean((1, 2)), pooled, atol=1e-5)
    with torch.inference_mode():  # at its own stride it is the same model
        own = Teacher.load(name, image_size=96)
        assert torch.allclose(
            own.encode(images_of(96))[0], model.encode_image(own.normalised(images_of(96))), atol=1e-5
        )
        wanted = torch.nn.functional.normalize(model.encode_text(own.tokenizer(["a bee"])), dim=1)
    assert torch.allclose(teacher.encode_text([["a bee"]]), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "options", "words"),
    [
        (TOWERS["convnext"], {"dense": "qq"}, "teacher.dense 'qq'.*ConvNeXt.*use paper"),
        (VIT, {"output_stride": 16}, "teacher.output_stride is an option of timm's CNNs"),
        (TOWERS["vit"], {"output_stride": 16}, "output_stride 16, which is not for every tower"),
        (TOWERS["fastvit"], {"output_stride": 16}, "output_stride 16, which is not for every tower"),
        (TOWERS["convnext"], {"image_size": 80}, "image_size 80 is no multiple of the patch of .*, 32"),
        (timm_("resnet10t", pool="abs_attn", proj=""), {}, None),
        (timm_("test_byobnet", proj="linear"), {}, None),
        (timm_("levit_128s", 224, pool="avg"), {}, "no dense tokens that are sound.*These have: open_clip's own ViTs"),
        (timm_("crossvit_tiny_240", 240, pool="token", proj=None), {}, "no dense tokens that are sound.*These have"),
        (timm_("nosuch"), {}, "nosuch"),
        (VIT | {"qk_norm": True}, {"dense": "value"}, "another: use paper"),
        (VIT | {"qk_norm": True}, {}, None),
    ],
)
def test_what_a_tower_can_not_is_one_line(tmp_path, vision, options, words):
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT})
    )
    size = options.get("image_size", vision["image_size"])

    def looked():
        found = describe(f"local-dir:{tmp_path}", None, options.get("output_stride"))
        seen = seen_by(found, size, options.get("dense", "paper"))
        if size % seen.patch:
            Teacher.load(f"local-dir:{tmp_path}", image_size=size)
        return seen

    if words is None:
        assert looked().channels == 16
        return
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(TeacherError, match=words) as error:
        looked()
    assert "\n" not in str(error.value)


def test_images_are_normalised_as_the_weights_were_trained():
    """A tag says so; a file can't, and takes what all tags of its model share."""
    assert describe("ViT-B-16-SigLIP", "webli", None).mean == (0.5, 0.5, 0.5)
    assert describe("ViT-B-16-SigLIP", "w.pt", None).std == (0.5, 0.5, 0.5)
    assert describe("MobileCLIP-S1", "w.pt", None).mean == (0.0, 0.0, 0.0)
    assert describe("ViT-B-16-quickgelu", "w.pt", None).mean == (0.48145466, 0.4578275, 0.40821073)
    assert describe("ViT-L-14", "laion2b_s32b_b82k", None).mean == (0.5, 0.5, 0.5)
    # Where it isn't OpenAI's it is in the fingerprint: caches from before the tags were read are of other pixels.
    assert unlike_openai("ViT-L-14", "laion2b_s32b_b82k") == [[0.5] * 3, [0.5] * 3]
    assert unlike_openai("ViT-L-14", "openai") is unlike_openai("ViT-B-16-quickgelu", "w.pt") is None
    assert unlike_openai("local-dir:folder", None) is None  # was always read


def test_towers_of_published_models():
    """Without their weights, at a size that isn't their own."""
    wanted = {
        "RN50": (32, 1024),
        "convnext_base_w": (32, 640),
        "EVA02-B-16": (16, 512),
        "MobileCLIP-S1": (32, 512),
        "MobileCLIP-B": (16, 512),
        "ViT-B-16-SigLIP2-256": (16, 768),
        "ViT-SO400M-14-SigLIP-384": (14, 1152),
        "PE-Core-T-16-384": (16, 512),
        "ViTamin-S": (16, 384),
        "coca_ViT-B-32": (32, 512),
    }
    for name, (patch, channels) in wanted.items():
        seen = seen_by(describe(name, None, None), 448, "paper")
        assert (seen.patch, seen.channels) == (patch, channels), name


def test_what_a_folder_says_of_its_model_is_part_of_the_extraction(tmp_path, run_cli):
    """Other numbers come of the same weights with another mean, or another activation; the weights say neither."""
    shutil.copytree(ROOT / "config" / "demo_teacher", tmp_path / "clip")
    asked = [*small_arguments(tmp_path, "data.train=4"), "--set", f"teacher.model=local-dir:{tmp_path / 'clip'}"]
    assert run_cli("extract", *asked).returncode == 0
    file = tmp_path / "clip" / "open_clip_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said, indent=4))
    assert "nothing to do" in run_cli("extract", *asked).stderr
    for changed in (
        said | {"preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}},
        said | {"model_cfg": {**said["model_cfg"], "quick_gelu": not said["model_cfg"].get("quick_gelu", False)}},
    ):
        file.write_text(json.dumps(changed))
        assert is_one_line_error(run_cli("extract", *asked), "the description of the teacher in its folder")


@pytest.mark.parametrize(
    "wrong", [{"mean": [0.5, 0.5]}, {"std": [0, 0.5, 0.5]}, {"mean": [123.7, 116.3, 103.5]}, {"std": "half"}]
)
def test_a_normalisation_that_is_none_is_one_line(tmp_path, wrong):
    name = folder_of(tmp_path / "m", VIT)
    file = tmp_path / "m" / "open_clip_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"preprocess_cfg": wrong}))
    with pytest.raises(TeacherError, match="want three numbers from 0 to 1") as error:
        describe(name, None, None)
    assert "\n" not in str(error.value)


def test_a_cache_from_before_descriptions_were_noted_stays(tmp_path, run_cli, monkeypatch):
    asked = small_arguments(tmp_path, "data.train=4")
    monkeypatch.setattr(extract, "description_of", lambda model: None)
    assert run_cli("extract", *asked).returncode == 0
    monkeypatch.undo()
    assert "nothing to do" in run_cli("extract", *asked).stderr
    (tmp_path / "runs" / "small" / "cache" / "extract.manifest.json").unlink()  # as if it had been killed
    assert "resuming, 4 of 4 images are done" in run_cli("extract", *asked).stderr


def test_a_tag_is_a_tag_whatever_lies_beside_it(tmp_path, monkeypatch):
    """A folder `openai`, in the working directory or where the run was made, isn't taken for the tag's weights."""
    (tmp_path / "openai").mkdir()
    monkeypatch.chdir(tmp_path)
    section = TeacherSection(model="ViT-B-16-quickgelu", pretrained="openai")
    for near in (None, tmp_path):
        section._near = near
        assert located(section) == ("ViT-B-16-quickgelu", "openai")
    section = TeacherSection(model="ViT-B-16-quickgelu", pretrained="mine")
    section._near = tmp_path / "project"
    (tmp_path / "project" / "mine").mkdir(parents=True)
    assert located(section)[1] == str(tmp_path / "project" / "mine")


def test_a_folder_has_its_activation_in_its_description(tmp_path):
    name = folder_of(tmp_path / "m", {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8})
    with pytest.raises(TeacherError, match=r"has GELU, and teacher\.quick_gelu is true: leave that key out"):
        Teacher.load(name, None, image_size=32, quick_gelu=True)
