"""Random adapter files in every layout, for the oracle's tiny models, named after diffusers' own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import oracle

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0", ".q_proj", ".k_proj", ".v_proj", ".out_proj")
LINEAR = (*ATTENTION, ".proj", ".net.2", ".proj_in", ".proj_out", ".fc1", ".fc2")
CONVOLUTIONS = (".conv1", ".conv2", ".conv", ".conv_shortcut", ".time_emb_proj")
RANK = 4

SINGLE = {
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.1.attentions.0": "input_blocks.3.1",
    "mid_block.attentions.0": "middle_block.1",
    "up_blocks.0.attentions.0": "output_blocks.0.1",
    "up_blocks.0.attentions.1": "output_blocks.1.1",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
}
"""Where the oracle's transformers are in CompVis' numbering, counted by hand: two levels of one resnet each, so
blocks 0 (conv_in), 1, 2 (down), 3 on the way down, and 0, 1, 2, 3 on the way up."""

Factors = dict[tuple[str, str], tuple[Tensor, Tensor, float]]
"""Part and module to down, up and alpha."""


def modules(kind: str, endings: tuple[str, ...]) -> dict[tuple[str, str], nn.Module]:
    """The linear layers and convolutions whose names end so, under the folder's names."""
    found = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        network = oracle.components(kind).get(part)
        for name, module in network.named_modules() if network is not None else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)) and f".{name}".endswith(endings):
                bare = name.removeprefix("text_model.")
                found[part, name if part == "unet" else f"text_model.{bare}"] = module
    return found


def factors(
    kind: str, *, endings: tuple[str, ...] = LINEAR, seed: int = 0, rank: int = RANK, alpha: float = 3.0
) -> Factors:
    """Random factors, loud enough to show."""
    generator = torch.Generator().manual_seed(seed)
    found: Factors = {}
    for place, module in modules(kind, endings).items():
        weight = module.weight
        assert isinstance(weight, Tensor)
        ones = (1,) * (weight.dim() - 2)
        size = (rank * weight[0].numel()) ** -0.25
        down = size * torch.randn((rank, *weight.shape[1:]), generator=generator)
        up = size * torch.randn((weight.shape[0], rank, *ones), generator=generator)
        found[place] = down, up, alpha
    return found


def kohya(kind: str, place: tuple[str, str], single: bool = False) -> str:
    """sd-scripts' name of a module."""
    part, module = place
    if part == "unet":
        for folder, ldm in SINGLE.items() if single else ():
            module = ldm + module.removeprefix(folder) if module.startswith(f"{folder}.") else module
        return f"lora_unet_{module.replace('.', '_')}"
    tower = (
        "te" if "text_encoder_2" not in oracle.components(kind) else "te2" if part.endswith("2") else "te1"
    )
    return f"lora_{tower}_{module.replace('.', '_')}"


def kohya_file(kind: str, made: Factors, single: bool = False) -> dict[str, Tensor]:
    """`lora_unet_..., lora_te_...` with alphas."""
    tensors = {}
    for place, (down, up, alpha) in made.items():
        name = kohya(kind, place, single)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(alpha),
        }
    return tensors


def kohya_single_file(kind: str, made: Factors) -> dict[str, Tensor]:
    """The same with CompVis' block numbers."""
    return kohya_file(kind, made, single=True)


def peft_file(kind: str, made: Factors) -> dict[str, Tensor]:
    """`unet....lora_A.weight`, which diffusers writes today."""
    return _dotted(made, lambda part, module: (f"{part}.{module}.lora_A", f"{part}.{module}.lora_B"))


def diffusers_file(kind: str, made: Factors) -> dict[str, Tensor]:
    """`unet....lora.down.weight`, and `lora_linear_layer` in text encoders."""

    def names(part: str, module: str) -> tuple[str, str]:
        leaf = "lora" if part == "unet" else "lora_linear_layer"
        return f"{part}.{module}.{leaf}.down", f"{part}.{module}.{leaf}.up"

    return _dotted(made, names)


def old_file(kind: str, made: Factors) -> dict[str, Tensor]:
    """`unet....attn1.processor.to_q_lora.down.weight`, and `self_attn.to_q_lora` in text encoders."""

    def names(part: str, module: str) -> tuple[str, str]:
        parent, leaf = module.removesuffix(".0").rsplit(".", 1)
        if part == "unet":
            return f"unet.{parent}.processor.{leaf}_lora.down", f"unet.{parent}.processor.{leaf}_lora.up"
        short = leaf.removesuffix("_proj")
        return f"{part}.{parent}.to_{short}_lora.down", f"{part}.{parent}.to_{short}_lora.up"

    return _dotted(made, names)


def _dotted(made: Factors, names: Callable[[str, str], tuple[str, str]]) -> dict[str, Tensor]:
    """Without alphas, which mean the rank then."""
    tensors = {}
    for (part, module), (down, up, _) in made.items():
        first, second = names(part, module)
        tensors |= {f"{first}.weight": down, f"{second}.weight": up}
    return tensors


LAYOUTS: dict[str, Callable[[str, Factors], dict[str, Tensor]]] = {
    "kohya": kohya_file,
    "kohya-single": kohya_single_file,
    "peft": peft_file,
    "diffusers": diffusers_file,
    "old": old_file,
}


def save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """A safetensors file."""
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    return str(path)


def write(
    path: Path, kind: str, layout: str = "kohya", *, dtype: torch.dtype = torch.float32, **options: Any
) -> str:
    """A random adapter in a layout."""
    if layout == "old":
        options.setdefault("endings", ATTENTION)
    tensors = LAYOUTS[layout](kind, factors(kind, **options))
    return save(path, {key: value.to(dtype) for key, value in tensors.items()})


def pipeline(kind: str, *files: tuple[str, float]) -> Any:
    """diffusers' pipeline with these LoRA files, on networks of its own."""
    pipe = oracle.pipeline(kind)
    for part in ("unet", "text_encoder", "text_encoder_2"):
        if getattr(pipe, part, None) is not None:
            setattr(pipe, part, copy.deepcopy(getattr(pipe, part)))
    for index, (file, _) in enumerate(files):
        pipe.load_lora_weights(file, adapter_name=f"a{index}")
    pipe.set_adapters([f"a{index}" for index in range(len(files))], [weight for _, weight in files])
    return pipe
