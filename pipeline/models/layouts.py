"""transformers' CLIP and SigLIP as open_clip has them: a config.json as a description, tensors by their names.

CLIPModel becomes open_clip's CLIP; SiglipModel and Siglip2Model (SigLIP and SigLIP 2) its CustomTextCLIP over timm's
ViT. Positions of Siglip2Model are those of its square grid.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OPENAI_MEAN_STD = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FAMILIES = ("clip", "siglip", "siglip2")
# What transformers leaves out of a config.json because it is its default.
CLIP_TEXT: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8,
    "max_position_embeddings": 77, "vocab_size": 49408, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
    "eos_token_id": 49407,
}  # fmt: skip
CLIP_VISION: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "image_size": 224, "patch_size": 32, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5,
}  # fmt: skip
SIGLIP_TEXT = CLIP_TEXT | {
    "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "max_position_embeddings": 64,
    "vocab_size": 32000, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6,
}  # fmt: skip
SIGLIP_VISION = CLIP_VISION | {"patch_size": 16, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}
# open_clip's arguments of nn.GELU, by transformers' name of the activation; QuickGELU is a key of the whole model.
ACTIVATIONS: dict[str, dict[str, str]] = {
    "quick_gelu": {},
    "gelu": {},
    "gelu_pytorch_tanh": {"approximate": "tanh"},
    "gelu_new": {"approximate": "tanh"},
}


def described(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """open_clip's model_cfg of a transformers config.json, and the arguments of its timm trunk ({} where it has none).

    Raises: ValueError that says what of it open_clip doesn't build.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is none of {', '.join(FAMILIES)}")
    is_clip = family == "clip"
    text = (CLIP_TEXT if is_clip else SIGLIP_TEXT) | dict(config.get("text_config") or {})
    vision = (CLIP_VISION if is_clip else SIGLIP_VISION) | dict(config.get("vision_config") or {})
    acts = {text["hidden_act"], vision["hidden_act"]}
    if unknown := acts - set(ACTIVATIONS):
        raise ValueError(f"hidden_act {unknown.pop()!r} is none of {', '.join(ACTIVATIONS)}")
    if "quick_gelu" in acts and len(acts) > 1:
        raise ValueError("hidden_act is quick_gelu in one of its towers alone")
    model: dict[str, Any] = {"quick_gelu": "quick_gelu" in acts, "text_cfg": _tower(text)}
    model["text_cfg"] |= {"context_length": text["max_position_embeddings"], "vocab_size": text["vocab_size"]}
    model["text_cfg"]["heads"] = text["num_attention_heads"]
    if is_clip:
        if text["eos_token_id"] != 2:  # 2 is what OpenAI's first conversions have, which pool where ids are largest
            model["text_cfg"] |= {"pool_type": "eos", "eos_id": text["eos_token_id"]}
        size = {"image_size": vision["image_size"], "patch_size": vision["patch_size"]}
        model["vision_cfg"] = _tower(vision) | size
        model["vision_cfg"]["head_width"] = vision["hidden_size"] // vision["num_attention_heads"]
        return model | {"embed_dim": config.get("projection_dim", 512)}, {}
    if not vision.get("vision_use_head", True):
        raise ValueError("vision_use_head is false, so its image tower pools nothing")
    side = vision["image_size"]
    if family == "siglip2":
        side = round(vision.get("num_patches", 256) ** 0.5) * vision["patch_size"]
    model["text_cfg"] |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    model["vision_cfg"] = {
        "image_size": side,
        "timm_model_name": "vit_base_patch16_siglip_224",  # every number of it is replaced by the trunk's arguments
        "timm_pool": "map",
        "timm_proj": "none",
    }
    trunk = {
        "img_size": side,
        "patch_size": vision["patch_size"],
        "embed_dim": vision["hidden_size"],
        "depth": vision["num_hidden_layers"],
        "num_heads": vision["num_attention_heads"],
        "mlp_ratio": _ratio(vision),
        "norm_layer": functools.partial(torch.nn.LayerNorm, eps=vision["layer_norm_eps"]),
        "act_layer": "gelu_tanh" if ACTIVATIONS[vision["hidden_act"]] else "gelu",
    }
    return model | {"custom_text": True, "init_logit_bias": -10, "embed_dim": vision["hidden_size"]}, trunk


def _tower(section: Mapping[str, Any]) -> dict[str, Any]:
    """What open_clip's own transformers take of either tower."""
    return {
        "width": section["hidden_size"],
        "layers": section["num_hidden_layers"],
        "mlp_ratio": _ratio(section),
        "norm_kwargs": {"eps": section["layer_norm_eps"]},
        **({"act_kwargs": kwargs} if (kwargs := ACTIVATIONS[section["hidden_act"]]) else {}),
    }


def _ratio(section: Mapping[str, Any]) -> float:
    """A ratio that open_clip and timm, which round down, make the width of again."""
    return (section["intermediate_size"] + 0.5) / section["hidden_size"]


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    return "vision_model.post_layernorm.weight" in state


# Applied in this order, each to what the last one made of the name.
IN_OWN_BLOCK = (
    (r"\.self_attn\.in_proj\.(\w+)$", r".attn.in_proj_\1"),
    (r"\.self_attn\.out_proj\.", ".attn.out_proj."),
    (r"\.layer_norm(\d)\.", r".ln_\1."),
    (r"\.mlp\.fc1\.", ".mlp.c_fc."),
    (r"\.mlp\.fc2\.", ".mlp.c_proj."),
)
IN_TIMM_BLOCK = (
    (r"\.self_attn\.in_proj\.", ".attn.qkv."),
    (r"\.self_attn\.out_proj\.", ".attn.proj."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
)
TEXT = (
    (r"^text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"^text_model\.embeddings\.position_embedding\.weight$", "positional_embedding"),
    (r"^text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"^text_model\.final_layer_norm\.", "ln_final."),
    (r"^text_projection\.weight$", "text_projection"),
    (r"^text_model\.head\.", "text_projection."),
    *IN_OWN_BLOCK,
)
CLIP_IMAGE = (
    (r"^vision_model\.embeddings\.class_embedding$", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.positional_embedding"),
    (r"^vision_model\.pre_layr?norm\.", "visual.ln_pre."),  # their own spelling
    (r"^vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"^vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"^visual_projection\.weight$", "visual.proj"),
    *IN_OWN_BLOCK,
)
SIGLIP_IMAGE = (
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual.trunk.patch_embed.proj."),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "visual.trunk.pos_embed"),
    (r"^vision_model\.post_layernorm\.", "visual.trunk.norm."),
    (r"^vision_model\.encoder\.layers\.", "visual.trunk.blocks."),
    (r"^vision_model\.head\.probe$", "visual.trunk.attn_pool.latent"),
    (r"^vision_model\.head\.attention\.out_proj\.", "visual.trunk.attn_pool.proj."),
    (r"^vision_model\.head\.attention\.(q|kv)\.", r"visual.trunk.attn_pool.\1."),
    (r"^vision_model\.head\.layernorm\.", "visual.trunk.attn_pool.norm."),
    (r"^vision_model\.head\.mlp\.", "visual.trunk.attn_pool.mlp."),
    *IN_TIMM_BLOCK,
)


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of CLIPModel, SiglipModel or Siglip2Model with open_clip's names; unknown names stay as they are."""
    state = _joined({name: value for name, value in state.items() if not name.endswith("position_ids")})
    is_siglip = "vision_model.head.probe" in state
    found = {}
    for name, value in state.items():
        is_text = name.startswith("text_")
        for pattern, wanted in TEXT if is_text else SIGLIP_IMAGE if is_siglip else CLIP_IMAGE:
            name = re.sub(pattern, wanted, name)
        if name in ("text_projection", "visual.proj"):
            value = value.T.contiguous()
        elif name == "visual.trunk.pos_embed":
            value = value[None]
        elif name == "visual.trunk.patch_embed.proj.weight" and value.ndim == 2:  # Siglip2Model's: (D, p * p * 3)
            side = round((value.shape[1] / 3) ** 0.5)
            value = value.reshape(-1, side, side, 3).permute(0, 3, 1, 2).contiguous()
        found["text." + name if is_text and is_siglip else name] = value
    return found


def _joined(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values of a block as one matrix; those of SigLIP's pooling as a query and a key with value."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if match := re.fullmatch(r"(.*\.self_attn\.)q_proj\.(weight|bias)", name):
            parts = [state[f"{match[1]}{part}_proj.{match[2]}"] for part in "qkv"]
            found[f"{match[1]}in_proj.{match[2]}"] = torch.cat(parts)
        elif match := re.fullmatch(r"(.*\.head\.attention\.)in_proj_(weight|bias)", name):
            width = len(value) // 3
            found[f"{match[1]}q.{match[2]}"], found[f"{match[1]}kv.{match[2]}"] = value.split([width, 2 * width])
        elif not re.search(r"\.self_attn\.[kv]_proj\.(weight|bias)$", name):
            found[name] = value
    return found
