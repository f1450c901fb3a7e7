"""Our teacher against open_clip's own forward, on random weights in several layouts."""

import json

import open_clip
import pytest
import torch
from open_clip.factory import resize_pos_embed

from pipeline.models.teacher import Teacher, TeacherError
from tests.conftest import ROOT

DEMO = f"local-dir:{ROOT}/config/demo_teacher"


def tiny_model(folder, *, quick_gelu=False):
    """A folder with a random CLIP, 2 layers, patch 8 at 32 x 32, C = 16; returns its open_clip name."""
    cfg = {
        "embed_dim": 16,
        "quick_gelu": quick_gelu,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return f"local-dir:{folder}"


def test_cls_is_encode_image_and_tokens_are_projected_patches():
    teacher = Teacher.load(DEMO, image_size=64)
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    cls, tokens = teacher.encode(images)
    assert cls.shape == (3, teacher.channels)
    assert tokens.shape == (3, 8, 8, teacher.channels)
    own = open_clip.create_model(DEMO).eval()
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    pixels = (images.float() / 255 - mean) / std
    with torch.inference_mode():
        assert torch.allclose(cls, own.encode_image(pixels), atol=1e-5)
        # The same path by open_clip's own parts: every token through ln_post and the projection.
        visual = own.visual
        hidden = visual.ln_post(visual.transformer(visual._embeds(pixels)))  # (B, 1 + L, width)
        expected = hidden[:, 1:] @ visual.proj
        assert torch.allclose(tokens.flatten(1, 2), expected, atol=1e-5)
        assert torch.allclose(cls, hidden[:, 0] @ visual.proj, atol=1e-5)


def test_positions_are_interpolated_as_open_clip_does():
    small, wide = Teacher.load(DEMO, image_size=64), Teacher.load(DEMO, image_size=128)
    state = {k: v.clone() for k, v in small.model.state_dict().items()}
    resize_pos_embed(state, wide.model)
    assert wide.model.visual.positional_embedding.shape[0] == 1 + 16 * 16
    assert torch.equal(wide.model.visual.positional_embedding, state["visual.positional_embedding"])


def test_rows_do_not_depend_on_their_neighbours_in_a_padded_batch():
    teacher = Teacher.load(DEMO, image_size=64)
    images = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8)
    other = images.clone()
    other[1:] = 0
    assert torch.equal(teacher.encode(images)[0][0], teacher.encode(other)[0][0])


def test_text_features_average_normalised_prompts():
    teacher = Teacher.load(DEMO, image_size=64)
    both = teacher.encode_text([["a photo of a bee.", "the bee."], ["zebra"]])
    one, two = teacher.encode_text([["a photo of a bee."]])[0], teacher.encode_text([["the bee."]])[0]
    assert torch.allclose(both[0], torch.nn.functional.normalize((one + two) / 2, dim=0), atol=1e-6)
    assert torch.allclose(both.norm(dim=1), torch.ones(2), atol=1e-6)


@pytest.mark.parametrize("layout", ["state_dict", "nested", "safetensors", "openai", "torchscript"])
def test_checkpoint_files_of_every_layout_load(tmp_path, layout):
    """A file of random ViT-B/16 weights loads whether torch, safetensors or OpenAI wrote it."""
    name = "ViT-B-16-quickgelu"
    torch.manual_seed(1)
    model = open_clip.create_model(name, load_weights=False)
    state = {k: v.half() for k, v in model.state_dict().items()}
    path = tmp_path / "weights.pt"
    if layout == "state_dict":
        torch.save(state, path)
    elif layout == "nested":
        torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    elif layout == "safetensors":
        from safetensors.torch import save_file

        path = tmp_path / "weights.safetensors"
        save_file({k: v.contiguous() for k, v in state.items()}, path)
    elif layout == "openai":
        extra = {"input_resolution": 224, "context_length": 77, "vocab_size": 49408}
        torch.save(state | {k: torch.tensor(v) for k, v in extra.items()}, path)
    else:
        torch.jit.save(torch.jit.script(Holder(state)), path)
    teacher = Teacher.load(name, str(path), image_size=256, quick_gelu=True)  # 16 x 16 of 14 x 14 positions
    found = teacher.model.visual.conv1.weight
    assert torch.equal(found, state["visual.conv1.weight"].float())


class Holder(torch.nn.Module):
    """A TorchScript archive with OpenAI's parameter names, in nested modules as theirs."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, torch.nn.Module())
                module = getattr(module, part)
            module.register_buffer(last, value)
        for name, value in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_quick_gelu_mismatch_is_an_error(tmp_path):
    with pytest.raises(TeacherError, match=r"has GELU.*want QuickGELU.*'ViT-B-16-quickgelu'"):
        Teacher.load("ViT-B-16", "openai", image_size=512)
    path = tmp_path / "weights.pt"
    torch.save({"logit_scale": torch.zeros(1)}, path)
    with pytest.raises(TeacherError, match=r"set teacher.quick_gelu"):
        Teacher.load("ViT-B-16", str(path), image_size=512)
    with pytest.raises(TeacherError, match=r"has GELU"):
        Teacher.load("ViT-B-16", str(path), image_size=512, quick_gelu=True)


def test_the_activation_is_the_config_s(tmp_path):
    """The check would be worth nothing if the two gave the same features."""
    plain, quick = (Teacher.load(tiny_model(tmp_path / str(q), quick_gelu=q), image_size=32) for q in (False, True))
    image = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    assert not torch.allclose(plain.encode(image)[0], quick.encode(image)[0], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "pretrained", "size", "words"),
    [
        ("ViT-B-17", None, 512, "knows no such model"),
        ("ViT-B-16-quickgelu", "nowhere/w.pt", 512, "no such file"),
        ("local-dir:nowhere", None, 64, "no such folder"),
        (DEMO, None, 60, "no multiple of the patch"),
        ("ViT-B-16", None, 512, "needs teacher.pretrained"),
    ],
)
def test_what_can_not_be_built_is_said(name, pretrained, size, words):
    with pytest.raises(TeacherError, match=words) as error:
        Teacher.load(name, pretrained, image_size=size, quick_gelu=True if pretrained else None)
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_checkpoint(tmp_path):
    path = tmp_path / "weights.pt"
    path.write_text("hello")
    with pytest.raises(TeacherError, match="not a checkpoint"):
        Teacher.load("ViT-B-16-quickgelu", str(path), image_size=224, quick_gelu=True)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(TeacherError, match="does not fit"):
        Teacher.load("ViT-B-16-quickgelu", str(path), image_size=224, quick_gelu=True)
