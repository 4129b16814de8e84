"""`load_model`: a source to networks that are complete, finite and ready to run.

Networks are built on the meta device and filled tensor by tensor from a memory map, straight in the wanted
type and place; no copy in another type is made first. Loading is strict: one error lists everything missing,
unexpected, misshapen or not finite.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import file_checksum, fitting_adapters
from ..adapters.merging import Adapters
from ..config import ModelConfig, TextConfig, UNetConfig, VAEConfig
from ..errors import CheckpointError
from ..networks.taesd import TinyDecoder, load_decoder
from ..networks.text import Encode, TextEncoder, tower_key
from ..networks.unet import UNet
from ..networks.vae import Autoencoder
from .blueprint import Blueprint, recognise
from .checkpoint import PART_FILES, Checkpoint, Layout, open_checkpoint, part_files, read_json
from .families import Options
from .keys import VAE_PREFIX, packing
from .parts import Part, Problems, Stored, pieces, stored_parts
from .safefile import WeightFile, Weights
from .source import EMBEDDED, resolve

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(eq=False)
class Model:
    """A loaded checkpoint. Networks are in eval mode, without gradients.

    Attributes:
        config: everything that says what it is.
        unet, vae, text: the networks.
        preview: a TAESD decoder for the same latents, if one was asked for.
        device, dtype: where and in what type they run; the autoencoder may be in float32 (`vae.dtype`).
        source: what `load_model` was given.
        adapters: LoRAs and their relatives that requests can name.
    """

    config: ModelConfig
    unet: UNet
    vae: Autoencoder
    text: TextEncoder
    preview: TinyDecoder | None
    device: torch.device
    dtype: torch.dtype
    source: str
    checkpoint: Checkpoint = field(repr=False)
    adapters: Adapters = field(default_factory=Adapters, repr=False)

    @cached_property
    def checksum(self) -> str:
        """sha256 of the files it was read from (`Checkpoint.checksum`); computed on first use.

        Raises:
            CheckpointError: a file was replaced since.
        """
        return self.checkpoint.checksum()


def load_model(
    source: str = EMBEDDED,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    vae_dtype: str | torch.dtype = "auto",
    vae: str | None = None,
    taesd: str | None = None,
    adapters: Mapping[str, str] | None = None,
    text: Encode | None = None,
    **options: Any,
) -> Model:
    """Reads a checkpoint, strictly.

    Args:
        source: "embedded", a path, an fsspec URL or a hub id; see `source.resolve`.
        device: "auto" is CUDA where there is one.
        dtype: "auto" is bfloat16 on CUDA that computes in it (else float16) and float32 on CPU, where half
            precision is many times slower. float32 is exact on CUDA too (`precision.exact_float32`).
        vae_dtype: "auto" is `dtype`, except float32 for a decoder that overflows in float16 (`force_upcast`).
        vae: source of an autoencoder to use instead of the checkpoint's.
        taesd: source of a TAESD decoder for previews.
        adapters: name to source of LoRAs and their relatives that requests may ask for.
        text: encodes prompts in place of the checkpoint's towers, then not loaded; see `load_texts`.
        options: see `families.Options`.

    Raises:
        CheckpointError: it cannot be found, read, recognised or filled completely.
        UnsafeCheckpoint: it is a pickle.
    """
    # OpenMP keeps a team of threads for each thread that ever computed in parallel, and where the teams together
    # outnumber the cores they stop spinning for work: an engine's thread then takes a third longer. So the
    # thread that fills the networks ends here, with its team.
    with ThreadPoolExecutor(1, "diffray-load") as apart:
        return apart.submit(
            _load, source, device, dtype, vae_dtype, vae, taesd, adapters, text, options
        ).result()


def _load(
    source: str,
    device: str | torch.device,
    dtype: str | torch.dtype,
    vae_dtype: str | torch.dtype,
    vae: str | None,
    taesd: str | None,
    adapters: Mapping[str, str] | None,
    text: Encode | None,
    options: dict[str, Any],
) -> Model:
    place = place_for(device)
    wanted = dtype_for(dtype, place)
    checkpoint = open_checkpoint(resolve(source))
    blueprint = recognise(checkpoint, Options.of(options), None if vae is None else stored_vae(vae))
    problems = blueprint.problems()
    problems.check(checkpoint.path)
    fitting = fitting_adapters(adapters or {}, blueprint)
    config = blueprint.config
    upcast = vae_dtype == "auto" and wanted == torch.float16 and config.vae.force_upcast
    vae_type = torch.float32 if upcast else wanted if vae_dtype == "auto" else dtype_for(vae_dtype, place)
    model = Model(
        config=config,
        unet=_unet(blueprint, problems, place, wanted),
        vae=_vae(blueprint, problems, place, vae_type),
        text=text_encoder(blueprint, problems, place, wanted, text),
        preview=None if taesd is None else load_decoder(resolve(taesd), config.vae.latent_channels),
        device=place,
        dtype=wanted,
        source=str(source),
        checkpoint=checkpoint,
    )
    problems.check(checkpoint.path)
    if model.preview is not None:
        model.preview.to(place, wanted)
    for network in (model.unet, model.vae, model.text, model.preview):
        if network is not None:
            network.eval().requires_grad_(False)
    for part in blueprint.parts.values():
        part.stored.weights.close()
    model.adapters = Adapters(fitting, model.unet, model.text, text_parts(blueprint))
    return model


def model_config(
    source: str = EMBEDDED,
    *,
    vae: str | None = None,
    adapters: Mapping[str, str] | None = None,
    **options: Any,
) -> ModelConfig:
    """What `load_model` with the same arguments would load, from headers and configs alone.

    Raises:
        CheckpointError: it cannot be found, read or recognised, or an adapter does not fit it.
    """
    known = Options.of(
        {k: v for k, v in options.items() if k not in ("dtype", "device", "vae_dtype", "taesd")}
    )
    blueprint = recognise(open_checkpoint(resolve(source)), known, None if vae is None else stored_vae(vae))
    fitting_adapters(adapters or {}, blueprint)
    return blueprint.config


def stored_vae(source: str) -> Stored:
    """An autoencoder from a whole checkpoint, a `vae` folder, or a file of its own, in either layout.

    Raises:
        CheckpointError: there is none.
    """
    path = resolve(source)
    if path.is_dir() and (path / "vae").is_dir():
        return stored_parts(open_checkpoint(path))["vae"]
    if path.is_dir():
        weights = Weights(map(WeightFile, part_files(path, PART_FILES["vae"])))
        return Stored(weights, "folder", config=read_json(path / "config.json"))
    checkpoint = open_checkpoint(path)
    weights = checkpoint.weights[""]
    for prefix in (VAE_PREFIX, "vae.", ""):
        layouts: tuple[tuple[Layout, str], ...] = (("single", "down"), ("folder", "down_blocks"))
        for layout, blocks in layouts:
            if any(key.startswith(f"{prefix}encoder.{blocks}.0.") for key in weights.entries):
                return Stored(weights, layout, prefix, config=checkpoint.config("vae/config.json"))
    raise CheckpointError(f"{path}: no autoencoder in it")


def vae_checksum(source: str) -> str:
    """sha256 over the weights and the config of what `stored_vae` reads.

    Raises:
        CheckpointError: there is none.
    """
    stored = stored_vae(source)
    lines = [file_checksum(file) for file in stored.weights.files]
    lines.append(json.dumps(stored.config, sort_keys=True))
    stored.weights.close()
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _unet(blueprint: Blueprint, problems: Problems, device: torch.device, dtype: torch.dtype) -> UNet:
    part = blueprint.parts["unet"]
    assert isinstance(part.config, UNetConfig)
    with torch.device("meta"):
        network = UNet(part.config)
    _fill(network, part, problems, device, dtype)
    return network


def _vae(blueprint: Blueprint, problems: Problems, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    part = blueprint.parts["vae"]
    assert isinstance(part.config, VAEConfig)
    with torch.device("meta"):
        network = Autoencoder(part.config)
    _fill(network, part, problems, device, dtype)
    return network


def text_parts(blueprint: Blueprint) -> list[str]:
    """The names of the text encoders, in order."""
    return [name for name, part in blueprint.parts.items() if isinstance(part.config, TextConfig)]


def text_encoder(
    blueprint: Blueprint,
    problems: Problems,
    device: torch.device,
    dtype: torch.dtype,
    elsewhere: Encode | None = None,
) -> TextEncoder:
    """The text encoder, filled, unless its towers are elsewhere."""
    parts = [blueprint.parts[name] for name in text_parts(blueprint)]
    tokenizers = [blueprint.tokenizers[part.name] for part in parts]
    with torch.device("meta"):
        network = TextEncoder(blueprint.config.text, tokenizers, elsewhere=elsewhere)
    for part, tower in zip(parts, network.towers, strict=elsewhere is None):
        assert isinstance(part.config, TextConfig)
        names = {tower_key(key, part.config): (key,) for key in part.shapes}
        _fill(
            tower,
            part,
            problems,
            device,
            dtype,
            {name: keys for name, keys in names.items() if name is not None},
        )
    return network.to(device, dtype)


def _fill(
    network: nn.Module,
    part: Part,
    problems: Problems,
    device: torch.device,
    dtype: torch.dtype,
    names: dict[str, tuple[str, ...]] | None = None,
) -> None:
    """Fills a network on the meta device; `names` maps each parameter to the folder tensors it joins."""
    parameters = network.state_dict()
    names = names or {name: packing(name) for name in parameters}
    found = pieces(part, problems, torch.finfo(dtype).max)
    state = {name: _place([found[key] for key in keys], device, dtype) for name, keys in names.items()}
    network.load_state_dict(state, strict=True, assign=True)


def _place(tensors: list[Tensor], device: torch.device, dtype: torch.dtype) -> Tensor:
    """Joined along the first axis, in memory of its own, convolutions channels-last."""
    joined = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
    layout = torch.channels_last if joined.dim() == 4 else torch.contiguous_format
    return joined.to(device, dtype, copy=len(tensors) == 1, memory_format=layout)


def place_for(device: str | torch.device) -> torch.device:
    """The device that is meant; "auto" is CUDA where there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def dtype_for(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The type that is meant; "auto" is what the device computes in."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype: got {dtype!r}, allowed is one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
