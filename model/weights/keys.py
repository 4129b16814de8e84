"""Tensor names: single files (CompVis, Stability's sgm), the diffusers folder, and the networks here.

Three steps, each a table generated from a config, so that every key is known before a file is opened:

    single file  --Rule-->  folder name  --packing-->  parameter of the network

Folder names are the canonical ones. A `Rule` says which tensor of a file holds one folder tensor (or the
three of OpenCLIP's fused `in_proj`), and works both ways. Packing joins projections that read the same input
(`to_q`, `to_k`, `to_v` -> `to_qkv`).

Reference: CompVis/stable-diffusion and Stability-AI/generative-models for the single-file names, diffusers
and transformers for the folder.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import TextConfig, UNetConfig, VAEConfig

Shape = tuple[int, ...]
Form = Literal["same", "conv1x1", "transpose", "thirds"]

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
EMA_PREFIX = "model_ema."
TEXT_MODEL = "text_model."


@dataclass(frozen=True, slots=True)
class Rule:
    """One tensor of a file and the folder tensors it holds.

    `form` is what differs besides the name: "conv1x1" files store a linear weight [A, B] as [A, B, 1, 1]
    (or already squeezed), "transpose" stores the transpose, "thirds" stacks three along the first axis.
    """

    file: str
    folder: tuple[str, ...]
    form: Form = "same"

    def fits(self, shape: Shape, folder: Shape) -> bool:
        """Whether a file tensor of `shape` can hold folder tensors that each have shape `folder`."""
        return shape in self.shapes(folder)

    def shapes(self, folder: Shape) -> tuple[Shape, ...]:
        """The shapes the file tensor may have, the usual one first."""
        if self.form == "conv1x1":
            return (*folder, 1, 1), folder
        if self.form == "transpose":
            return (folder[::-1],)
        if self.form == "thirds":
            return ((3 * folder[0], *folder[1:]),)
        return (folder,)

    def unpack(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """The folder tensors in a file tensor, as views."""
        if self.form == "conv1x1":
            return (tensor.flatten(1),)
        if self.form == "transpose":
            return (tensor.t(),)
        if self.form == "thirds":
            return tensor.chunk(3)
        return (tensor,)

    def pack(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The file tensor of folder tensors; the inverse of `unpack`, contiguous."""
        if self.form == "conv1x1":
            return tensors[0][:, :, None, None].contiguous()
        if self.form == "transpose":
            return tensors[0].t().contiguous()
        if self.form == "thirds":
            return torch.cat(tensors)
        return tensors[0].contiguous()


def packing(parameter: str) -> tuple[str, ...]:
    """The folder tensors that a network parameter joins along its first axis, in order."""
    module, _, leaf = parameter.rpartition(".")
    parent, _, name = module.rpartition(".")
    parts = {"to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v")}.get(name, (name,))
    return tuple(".".join(filter(None, (parent, part, leaf))) for part in parts)


def folder_shapes(parameters: Mapping[str, Tensor]) -> dict[str, Shape]:
    """Folder tensor names and shapes of a network's state dict (meta tensors will do)."""
    shapes: dict[str, Shape] = {}
    for name, tensor in parameters.items():
        parts = packing(name)
        for part in parts:
            shapes[part] = (tensor.shape[0] // len(parts), *tensor.shape[1:])
    return shapes


# UNet ------------------------------------------------------------------------------------------------------

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "time_embedding.cond_proj": "time_embed.cond_proj",  # distilled networks; ComfyUI's name
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "class_embedding": "label_emb",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def unet_modules(config: UNetConfig) -> dict[str, str]:
    """Folder module path to single-file module path (without `model.diffusion_model.`)."""
    table = dict(UNET_ENDS)

    def layer(block: str, index: int, depth: int, target: str) -> None:
        table.update({f"{block}.resnets.{index}.{a}": f"{target}.0.{b}" for a, b in RESNET.items()})
        if depth:
            table[f"{block}.attentions.{index}"] = f"{target}.1"

    last = len(config.channels) - 1
    n = 1
    for level, depths in enumerate(config.down):
        for index, depth in enumerate(depths):
            layer(f"down_blocks.{level}", index, depth, f"input_blocks.{n}")
            n += 1
        if level < last:
            table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{n}.0.op"
            n += 1
    second = 1 if config.mid_depth is None else 2
    for index, target in ((0, 0), (1, second)):
        table.update(
            {f"mid_block.resnets.{index}.{a}": f"middle_block.{target}.{b}" for a, b in RESNET.items()}
        )
    table["mid_block.attentions.0"] = "middle_block.1"
    n = 0
    for block, level in enumerate(range(last, -1, -1)):
        depths = config.up[level]
        for index, depth in enumerate(depths):
            layer(f"up_blocks.{block}", index, depth, f"output_blocks.{n}")
            n += 1
        if level:
            slot = 2 if depths[-1] else 1
            table[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{n - 1}.{slot}.conv"
    return table


# Autoencoder -----------------------------------------------------------------------------------------------

VAE_MID = {
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0.group_norm": "mid.attn_1.norm",
    "mid_block.attentions.0.to_q": "mid.attn_1.q",
    "mid_block.attentions.0.to_k": "mid.attn_1.k",
    "mid_block.attentions.0.to_v": "mid.attn_1.v",
    "mid_block.attentions.0.to_out.0": "mid.attn_1.proj_out",
}
VAE_ATTENTION = "mid_block.attentions.0.to_"
LEGACY_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
"""Names of diffusers before 0.13, still on disk in many SD1 and SD2 folders."""


def vae_modules(config: VAEConfig) -> dict[str, str]:
    """Folder module path to single-file module path (without `first_stage_model.`)."""
    table: dict[str, str] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    last = len(config.channels) - 1
    for side, block, resample, resnets in (
        ("encoder", "down", "downsample", config.resnets),
        ("decoder", "up", "upsample", config.resnets + 1),
    ):
        table |= {f"{side}.{a}": f"{side}.{b}" for a, b in VAE_MID.items()}
        table |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
        table[f"{side}.conv_norm_out"] = f"{side}.norm_out"
        for index in range(last + 1):
            source, level = f"{side}.{block}_blocks.{index}", index if block == "down" else last - index
            target = f"{side}.{block}.{level}"
            for n in range(resnets):
                table[f"{source}.resnets.{n}"] = f"{target}.block.{n}"
                table[f"{source}.resnets.{n}.conv_shortcut"] = f"{target}.block.{n}.nin_shortcut"
            table[f"{source}.{resample}rs.0.conv"] = f"{target}.{resample}.conv"
    return table


# Text ------------------------------------------------------------------------------------------------------

CLIP_LAYER = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj")
OPENCLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def text_shapes(config: TextConfig) -> dict[str, Shape]:
    """Folder tensor names and shapes of a CLIP text tower (the names of transformers before 5.6)."""
    d, inner = config.hidden, config.intermediate
    shapes: dict[str, Shape] = {
        f"{TEXT_MODEL}embeddings.token_embedding.weight": (config.vocab, d),
        f"{TEXT_MODEL}embeddings.position_embedding.weight": (config.positions, d),
    }
    layer: dict[str, Shape] = {}
    for name in CLIP_LAYER:
        layer |= {f"{name}.weight": (d, d), f"{name}.bias": (d,)}
    layer |= {"layer_norm1.weight": (d,), "layer_norm1.bias": (d,)}
    layer |= {
        "mlp.fc1.weight": (inner, d),
        "mlp.fc1.bias": (inner,),
        "mlp.fc2.weight": (d, inner),
        "mlp.fc2.bias": (d,),
    }
    layer |= {"layer_norm2.weight": (d,), "layer_norm2.bias": (d,)}
    for n in range(config.layers):
        shapes |= {f"{TEXT_MODEL}encoder.layers.{n}.{name}": shape for name, shape in layer.items()}
    shapes |= {f"{TEXT_MODEL}final_layer_norm.weight": (d,), f"{TEXT_MODEL}final_layer_norm.bias": (d,)}
    if config.projection_dim is not None:
        shapes["text_projection.weight"] = (config.projection_dim, d)
    return shapes


def openclip_rules(config: TextConfig, prefix: str) -> Iterator[Rule]:
    """Rules of an OpenCLIP text tower (`transformer.resblocks`) stored under `prefix`."""
    yield Rule(f"{prefix}positional_embedding", (f"{TEXT_MODEL}embeddings.position_embedding.weight",))
    if config.projection_dim is not None:
        yield Rule(f"{prefix}text_projection", ("text_projection.weight",), "transpose")
    for leaf in ("weight", "bias"):
        yield Rule(f"{prefix}ln_final.{leaf}", (f"{TEXT_MODEL}final_layer_norm.{leaf}",))
        for n in range(config.layers):
            block, layer = f"{prefix}transformer.resblocks.{n}.", f"{TEXT_MODEL}encoder.layers.{n}."
            packed = tuple(f"{layer}self_attn.{x}_proj.{leaf}" for x in "qkv")
            yield Rule(f"{block}attn.in_proj_{leaf}", packed, "thirds")
            for name, target in OPENCLIP_LAYER.items():
                yield Rule(f"{block}{target}.{leaf}", (f"{layer}{name}.{leaf}",))
    yield Rule(f"{prefix}token_embedding.weight", (f"{TEXT_MODEL}embeddings.token_embedding.weight",))


# Rules of whole parts --------------------------------------------------------------------------------------


def renamed(table: Mapping[str, str], folder: Iterable[str], prefix: str) -> list[Rule]:
    """Rules that rename each folder tensor by the longest module path of `table` that leads to it."""
    rules = []
    for key in folder:
        path = key
        while path not in table:
            path, dot, _ = path.rpartition(".")
            if not dot:
                raise KeyError(f"no single-file name for {key}")
        squeezed = VAE_ATTENTION in key and key.endswith(".weight")
        rules.append(Rule(prefix + table[path] + key[len(path) :], (key,), "conv1x1" if squeezed else "same"))
    return rules


def ema_rules(rules: Iterable[Rule]) -> list[Rule]:
    """The same UNet tensors from the moving average: `model_ema.` and the name with its dots removed."""
    return [Rule(ema_name(r.file), r.folder, r.form) for r in rules]


def ema_name(file: str) -> str:
    """Name of the moving average of `model.<name>` (CompVis' LitEma cannot have dots in buffer names)."""
    return EMA_PREFIX + file.removeprefix("model.").replace(".", "")


def vae_folder_rules(folder: Iterable[str], present: Mapping[str, object]) -> list[Rule]:
    """Rules of a VAE folder; its attention may carry the names from before diffusers 0.13."""
    rules = []
    for key in folder:
        file = key
        if key not in present and VAE_ATTENTION in key:
            module, leaf = key.rsplit(".", 1)
            parent, name = module.split("attentions.0.")
            file = f"{parent}attentions.0.{LEGACY_ATTENTION[name]}.{leaf}"
        rules.append(Rule(file, (key,), "same"))
    return rules


def clip_rules(folder: Iterable[str], prefix: str, present: Mapping[str, object]) -> list[Rule]:
    """Rules of a CLIP tower under Hugging Face names; files exist with and without `text_model.`."""
    bare = not any(key.startswith(prefix + TEXT_MODEL) for key in present)
    return [Rule(prefix + (key.removeprefix(TEXT_MODEL) if bare else key), (key,)) for key in folder]
