"""Weights as people have them: transformers' CLIP, SigLIP and SigLIP 2, snapshots of the hub, checkpoints in parts."""

import argparse
import json
import shutil

import open_clip
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from pipeline.models.clip import weights_files
from pipeline.models.teacher import Teacher, TeacherError
from pipeline.models.weights import WeightsError, read_state, weights_in
from tests.conftest import is_one_line_error
from tests.test_teacher import tiny_model
from tests.test_teacher_towers import images_of

TEXT = {"intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
TEXT |= {"max_position_embeddings": 12, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 1}
VISION = {"hidden_size": 48, "intermediate_size": 110, "num_hidden_layers": 2, "num_attention_heads": 3}
VISION |= {"image_size": 32, "patch_size": 8}


def transformers_model(family, **vision):
    """A random model of transformers, of different widths wherever it can have them."""
    torch.manual_seed(0)
    if family == "clip":
        kind, config = transformers.CLIPModel, transformers.CLIPConfig
        parts = {"text_config": {"hidden_size": 32, **TEXT}, "projection_dim": 24}
    else:
        number = "2" if family == "siglip2" else ""
        kind = getattr(transformers, f"Siglip{number}Model")
        config = getattr(transformers, f"Siglip{number}Config")
        parts = {"text_config": {"hidden_size": 32, **TEXT, "projection_size": 48}}
    sizes = VISION | ({"num_patches": 16} if family == "siglip2" else {}) | vision
    model = kind(config(**parts, vision_config=sizes)).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, 0, 0.2)
    return model


def own_features(model, family, pixels, ids):
    """Image and text features of transformers' own forward."""
    with torch.inference_mode():
        if family == "siglip2":  # takes patches, flattened row by row
            patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), 16, -1)
            mask, shape = torch.ones(len(pixels), 16, dtype=torch.long), torch.tensor([[4, 4]] * len(pixels))
            image = model.get_image_features(pixel_values=patches, pixel_attention_mask=mask, spatial_shapes=shape)
        else:
            image = model.get_image_features(pixel_values=pixels)
        text = model.get_text_features(input_ids=ids)
    return [getattr(value, "pooler_output", value) for value in (image, text)]


@pytest.mark.parametrize("kept", ["safetensors", "bin", "parts"])
@pytest.mark.parametrize("family", ["clip", "siglip", "siglip2"])
def test_a_snapshot_by_transformers_gives_its_own_features(tmp_path, family, kept):
    model = transformers_model(family)
    model.save_pretrained(tmp_path, max_shard_size="40KB" if kept == "parts" else "1GB")
    if kept == "bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    elif kept == "parts":
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert not (tmp_path / "model.safetensors").exists()
    teacher = Teacher.load(f"local-dir:{tmp_path}", image_size=None)
    assert teacher.mean == ((0.48145466, 0.4578275, 0.40821073) if family == "clip" else (0.5, 0.5, 0.5))
    images = images_of(32)
    ids = torch.randint(2, 60, (3, 12), generator=torch.Generator().manual_seed(2))
    ids[:, 9:] = torch.tensor([63, 63, 63] if family == "clip" else [63, 1, 1])
    image, text = own_features(model, family, teacher.normalised(images), ids)
    assert torch.allclose(teacher.encode(images)[0], image, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(teacher.model.encode_text(ids), text, atol=1e-4, rtol=1e-4)
    assert teacher.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert teacher.can_explain == (family == "clip")


def test_positions_of_a_snapshot_are_interpolated(tmp_path):
    transformers_model("siglip").save_pretrained(tmp_path)
    teacher = Teacher.load(f"local-dir:{tmp_path}", image_size=64)
    assert teacher.encode(images_of(64))[1].shape == (2, 8, 8, 48)


@pytest.mark.parametrize(("act", "pooled"), [("gelu", 63), ("quick_gelu", 2), ("gelu_pytorch_tanh", 63)])
def test_a_snapshot_says_its_activation_and_where_text_is_pooled(tmp_path, act, pooled):
    """OpenAI's first conversions have 2 as the last word's id, and pool where ids are largest."""
    model = transformers_model("clip", hidden_act=act)
    config = model.config
    config.text_config.hidden_act, config.text_config.eos_token_id = act, pooled
    model = transformers.CLIPModel(config).eval()
    for value in model.parameters():
        torch.nn.init.normal_(value, 0, 0.2)
    model.save_pretrained(tmp_path)
    teacher = Teacher.load(f"local-dir:{tmp_path}", image_size=None)
    ids = torch.randint(3, 60, (3, 12))
    ids[:, 5] = 63
    image, text = own_features(model, "clip", teacher.normalised(images_of(32)), ids)
    assert torch.allclose(teacher.encode(images_of(32))[0], image, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        assert torch.allclose(teacher.model.encode_text(ids), text, atol=1e-4, rtol=1e-4)


def test_a_file_of_transformers_fills_a_model_of_open_clip_s_names(tmp_path):
    """The published sizes that a config.json leaves out, and tensors under a built-in name."""
    sizes = {"hidden_size": 768, "num_hidden_layers": 12}
    model = transformers.CLIPModel(transformers.CLIPConfig(vision_config={**sizes, "patch_size": 32}))
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "text_config": {}}))
    named = Teacher.load("ViT-B-32-quickgelu", str(tmp_path), image_size=224, quick_gelu=True)
    described = Teacher.load(f"local-dir:{tmp_path}", image_size=224)
    assert named.provenance["weights_sha256"] == described.provenance["weights_sha256"]
    assert torch.equal(named.encode(images_of(224, 1))[0], described.encode(images_of(224, 1))[0])
    assert torch.allclose(described.encode_text([["a bee"]]).norm(), torch.tensor(1.0))  # its words are open_clip's


def test_open_clip_s_file_is_taken_where_transformers_lies_beside_it(tmp_path):
    name = tiny_model(tmp_path / "tiny")
    folder = tmp_path / "tiny"
    state = torch.load(folder / "open_clip_pytorch_model.bin")
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    torch.save({"a": 1}, folder / "a_training_state.bin")
    assert weights_in(folder) == folder / "open_clip_pytorch_model.bin"
    teacher = Teacher.load(name, image_size=32)
    assert torch.equal(teacher.model.visual.proj, state["visual.proj"])
    assert weights_files(name, None) == [folder / "open_clip_pytorch_model.bin"]
    save_file({k: v.contiguous() + 1 for k, v in state.items()}, folder / "open_clip_model.safetensors")
    assert weights_in(folder).name == "open_clip_model.safetensors"
    assert weights_in(tmp_path) is None


@pytest.fixture
def parts(tmp_path):
    """A state dict in two files and their index."""
    save_file({"a": torch.ones(2)}, tmp_path / "w-1.safetensors")
    torch.save({"b": torch.ones(3)}, tmp_path / "w-2.bin")
    index = tmp_path / "model.safetensors.index.json"
    where = {"a": "w-1.safetensors", "b": "w-2.bin"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return index, where


def test_parts_are_one_state(parts):
    index, _ = parts
    assert {name: len(value) for name, value in read_state(index).items()} == {"a": 2, "b": 3}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"b": "../w-2.bin"}, "lie beside their index"),
        ({"b": "/etc/passwd"}, "lie beside their index"),
        ({"b": "w-2.json"}, "lie beside their index"),
        ({"b": "w-3.bin"}, "lists w-3.bin, which is missing"),
        ({"c": "w-1.safetensors"}, "'c' is not in w-1.safetensors"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(parts, changed, words):
    index, where = parts
    index.write_text(json.dumps({"weight_map": where | changed}))
    with pytest.raises(WeightsError, match=words) as error:
        read_state(index)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', "\xff"])
def test_no_index(parts, content):
    index, _ = parts
    index.write_bytes(content.encode("latin-1"))
    with pytest.raises(WeightsError, match="want a JSON file with a weight_map"):
        read_state(index)


def test_extra_objects_are_one_line_without_colours(tmp_path):
    """torch answers with a page, in bold, and advises to load the file unsafely."""
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1)}, tmp_path / "w.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "late.pt", pickle_protocol=4)
    for name, words in (("w.pt", "it holds argparse.Namespace"), ("late.pt", "safe loader can't read it")):
        with pytest.raises(WeightsError, match=words) as error:
            read_state(tmp_path / name)
        assert error.value.args[0].isprintable()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is none of clip, siglip, siglip2"),
        ({"model_type": "clip", "text_config": {"hidden_act": "gelu"}}, "quick_gelu in one of its towers alone"),
        ({"model_type": "siglip", "vision_config": {"hidden_act": "swish"}}, "hidden_act 'swish'"),
        ({"model_type": "siglip", "vision_config": {"vision_use_head": False}}, "vision_use_head is false"),
        ([], "can't be understood"),
        ("", "can't be understood"),
    ],
)
def test_a_description_that_open_clip_does_not_build_is_one_line(tmp_path, run_cli, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config) if config != "" else "{")
    settings = ["--set", f"teacher.model=local-dir:{tmp_path}", "--set", "teacher.pretrained=null"]
    assert is_one_line_error(run_cli("doctor", "--dry", *settings), words)


def test_a_snapshot_without_weights_or_with_others(tmp_path, run_cli):
    transformers_model("siglip").save_pretrained(tmp_path / "m")
    settings = ["--set", f"teacher.model=local-dir:{tmp_path}/m", "--set", "teacher.pretrained=null"]
    settings += ["--set", f"runs={tmp_path}", "--set", "teacher.image_size=64"]
    shutil.copytree(tmp_path / "m", tmp_path / "kept")
    state = load_file(tmp_path / "m" / "model.safetensors")
    del state["vision_model.head.probe"]
    save_file(state, tmp_path / "m" / "model.safetensors")
    assert is_one_line_error(run_cli("extract", *settings), "does not fit the model")
    (tmp_path / "m" / "model.safetensors").unlink()
    assert is_one_line_error(run_cli("extract", *settings), "holds no weights")
    (tmp_path / "m" / "config.json").unlink()
    assert is_one_line_error(run_cli("extract", *settings), "no open_clip_config.json, and no config.json")
    shutil.rmtree(tmp_path / "m")
    shutil.copytree(tmp_path / "kept", tmp_path / "m")  # SigLIP's words want the folder's tokenizer
    assert is_one_line_error(run_cli("extract", *settings), "its tokenizer can't be had", "text.features")


def test_of_open_clip_s_names_only_those_with_a_twin_must_say_their_activation(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(TeacherError, match=r"set teacher\.quick_gelu"):
        Teacher.load("ViT-B-32", str(path), image_size=224)
    assert "ViT-B-16-SigLIP-quickgelu" not in open_clip.list_models()
    with pytest.raises(TeacherError, match="does not fit the model"):
        Teacher.load("ViT-B-16-SigLIP", str(path), image_size=224)
