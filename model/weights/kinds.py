"""What else a file can be: models and add-ons that are recognised by their tensor names, and refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

KINDS: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)joint_blocks\.0\.|^transformer_blocks\.0\.attn\.add_k_proj\.",
        "a Stable Diffusion 3 checkpoint (MMDiT)",
    ),
    (r"(^|\.)double_blocks\.0\.|^single_transformer_blocks\.0\.", "a Flux checkpoint"),
    (
        r"^control_model\.|(^|\.)zero_convs\.0\.|^controlnet_(cond_embedding|down_blocks|mid_block)\.",
        "a ControlNet",
    ),
    (
        r"lora_|\.lora\.(down|up)|\.lora_[AB]\.|_lora\.(down|up)\.|\.hada_w1_|\.lokr_w1|dora_scale$",
        "a LoRA (option adapters)",
    ),
    (r"^image_proj\.|^ip_adapter\.", "an IP-Adapter"),
    (r"^(adapter\.)?body\.0\.(block1|in_conv|resnets)\.|^adapter\.conv_in\.", "a T2I-Adapter"),
    (
        r"^(taesd_)?((de|en)coder\.)?(layers\.)?\d+\.conv\.0\.weight$",
        "a TAESD tiny autoencoder (option taesd)",
    ),
    (r"\.time_stack\.|\.time_mixer\.|temporal_transformer_blocks\.", "a video diffusion checkpoint"),
    (r"^clf\.1\.weight$|^clip_(txt_)?mapper\.|^effnet\.", "a Stable Cascade checkpoint"),
    (r"^cc_projection\.", "a Zero123 checkpoint"),
    (
        r"\.scale_weight$|(^|\.)scaled_fp8$",
        "an fp8-scaled checkpoint; convert it to float16 with the tool that made it",
    ),
    (r"^concept_embeds$|^vision_model\.vision_model\.", "a safety checker"),
    (r"^vision_model\.", "a CLIP image encoder"),
    (r"^encoder\.block\.0\.layer\.0\.SelfAttention\.", "a T5 text encoder"),
    (r"^(emb_params|string_to_param|clip_[lg])(\.|$)", "a textual inversion embedding"),
)
"""Tensor name pattern to what the file is; the first that matches any name wins."""
ALONE: tuple[tuple[str, str], ...] = (
    (r"^((model\.)?diffusion_model\.)?input_blocks\.0\.0\.weight$|^conv_in\.weight$", "a UNet alone"),
    (r"^(first_stage_model\.|vae\.)?encoder\.conv_in\.weight$", "an autoencoder alone (option vae)"),
    (r"^(text_model\.|transformer\.)?(encoder\.layers|resblocks)\.0\.", "a text encoder alone"),
)


def kind_of(keys: Mapping[str, object], kinds: tuple[tuple[str, str], ...] = KINDS) -> str | None:
    """What a file with these tensor names is, None when no pattern knows it."""
    for pattern, kind in kinds:
        search = re.compile(pattern).search
        if any(search(key) for key in keys):
            return kind
    return None
