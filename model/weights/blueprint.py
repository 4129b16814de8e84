"""From an opened checkpoint to a complete plan: every network's config, and where each of its tensors is.

Nothing is read but headers and, for SD2 without any other hint, one bias. A blueprint accounts for every key:
used by a rule, on the named list of ignored keys, or reported.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..config import Family, ModelConfig, TextConfig, UNetConfig, VAEConfig
from ..errors import CheckpointError
from ..networks.tokenizer import ClipTokenizer
from ..networks.towers import Tower, detect_text
from ..networks.unet import UNet
from ..networks.vae import Autoencoder
from .checkpoint import DEFAULTS_FILE, Checkpoint
from .detect import detect_unet, detect_vae
from .evidence import Evidence, defaults_of, noise_of
from .families import FAMILIES, Options, family_of, task_of
from .keys import (
    Rule,
    clip_rules,
    ema_rules,
    folder_shapes,
    openclip_rules,
    renamed,
    text_shapes,
    unet_modules,
    vae_folder_rules,
    vae_modules,
)
from .kinds import ALONE, kind_of
from .parts import SINGLE_PARTS, Part, Problems, Stored, label, stored_parts
from .safefile import FLOATS

XL_PREFIX = "conditioner."

IGNORED: tuple[tuple[str, str], ...] = (
    (
        r"^((low_scale_model|noise_augmentor)\.)?((sqrt_|log_)?(one_minus_|recip_|recipm1_)?alphas_cumprod(_prev)?"
        r"|betas|posterior_(variance|log_variance_clipped|mean_coef[12])|lvlb_weights|logvar)$",
        "buffers of the training schedule, computed here",
    ),
    (
        r"^(sigmas|log_sigmas|denoiser\.sigmas|scale_factor)$",
        "buffers of the training schedule, computed here",
    ),
    (r"^model_ema\.", "moving average of the weights (option ema)"),
    (r"(^|\.)embeddings\.position_ids$", "a counter"),
    (r"(^|\.)logit_scale$", "CLIP's loss scale"),
    (r"\.attn_mask$", "the causal mask, computed here"),
    (r"^depth_model\.", "the depth estimator of SD2-depth; the depth map is an input here"),
    (r"^embedder\.", "the image encoder of unCLIP; the image embedding is an input here"),
    (r"^noise_augmentor\.(data_mean|data_std)$", "normalisation of unCLIP's image embedding"),
    (r"^(first_stage_model\.)?loss\.", "the discriminator that trained the autoencoder"),
    (r"^first_stage_model\.model_ema\.", "moving average of the autoencoder"),
    (r"^(v_pred|ztsnr)$", "markers, read as such"),
    (r"^(global_step|epoch|cond_stage_model\.mean|cond_stage_model\.std)$", "training state"),
)
"""Key pattern to why a key that matches may stay unused."""
_IGNORED = [re.compile(pattern) for pattern, _ in IGNORED]


@dataclass(frozen=True)
class Blueprint:
    """A recognised checkpoint: what it is, and where each tensor of its networks lies."""

    checkpoint: Checkpoint
    config: ModelConfig
    parts: dict[str, Part]
    tokenizers: dict[str, ClipTokenizer]
    unused: list[str]
    """Keys that no rule uses and that are not ignored."""

    def problems(self) -> Problems:
        """Everything wrong that headers show; no tensor is read."""
        found = Problems(unexpected=list(self.unused))
        for part in self.parts.values():
            entries = part.stored.weights.entries
            for rule in part.rules:
                entry, shape = entries.get(rule.file), part.shapes[rule.folder[0]]
                if entry is None:
                    found.missing.append(label(part, rule.file))
                elif not rule.fits(entry.shape, shape):
                    wanted = list(rule.shapes(shape)[0])
                    found.misshapen.append(
                        f"{label(part, rule.file)} (got {list(entry.shape)}, wanted {wanted})"
                    )
                elif entry.dtype not in FLOATS:
                    found.misshapen.append(
                        f"{label(part, rule.file)} (got type {entry.dtype}, wanted floats)"
                    )
        return found


# Recognition -----------------------------------------------------------------------------------------------


def recognise(checkpoint: Checkpoint, options: Options | None = None, vae: Stored | None = None) -> Blueprint:
    """What a checkpoint is.

    Args:
        checkpoint: as opened.
        options: what the caller knows better.
        vae: an autoencoder to use instead of the checkpoint's own.

    Raises:
        CheckpointError: it is something else (says what), incomplete, or contradicts its own configs.
    """
    options = (options or Options()).over(checkpoint.config(DEFAULTS_FILE))
    for weights in checkpoint.weights.values():
        if kind := kind_of(weights.entries):
            raise CheckpointError(
                f"{checkpoint.path}: this is {kind}, not a Stable Diffusion 1, 2 or XL checkpoint"
            )
    try:
        return _recognise(checkpoint, options, vae)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint.path}: {error}") from error


def _recognise(checkpoint: Checkpoint, options: Options, vae: Stored | None) -> Blueprint:
    stored = stored_parts(checkpoint)
    own_vae = stored.get("vae")
    if vae is not None:
        stored["vae"] = vae
    _check_complete(checkpoint, stored)
    xl = any(part.prefix.startswith(XL_PREFIX) for part in stored.values())
    unet = detect_unet(stored["unet"].shapes(), checkpoint.layout, stored["unet"].config, xl=xl)
    towers = {name: part.style for name, part in stored.items() if part.style}
    family = family_of(unet, towers)
    parts = {"unet": _unet_part(unet, stored["unet"], options.ema)}
    parts["vae"] = _vae_part(stored["vae"], family, own_vae)
    tokenizers = {}
    for name in FAMILIES[family].text:
        if name not in stored:
            raise CheckpointError(f"{family} without a {name}: a complete checkpoint is needed")
        parts[name], tokenizers[name] = _text_part(checkpoint, name, stored[name], family)
    config = _model_config(checkpoint, family, parts, options)
    wanted = sum(p.config.hidden for p in parts.values() if isinstance(p.config, TextConfig))
    if unet.context_dim != wanted:
        raise CheckpointError(
            f"the UNet reads text states {unet.context_dim} wide, the text encoders give {wanted}"
        )
    return Blueprint(checkpoint, config, parts, tokenizers, list(_unused(checkpoint, parts)))


def _check_complete(checkpoint: Checkpoint, stored: Mapping[str, Stored]) -> None:
    if "unet" in stored and "vae" in stored:
        return
    if (
        checkpoint.layout == "single"
        and (kind := kind_of(checkpoint.weights[""].entries, ALONE))
        and not stored
    ):
        raise CheckpointError(f"this is {kind}, not a whole checkpoint")
    if not stored:
        names = sorted(checkpoint.weights[""].entries)[:5] if "" in checkpoint.weights else []
        raise CheckpointError(
            f"not a known kind of checkpoint; its first tensors are {', '.join(names) or 'none'}"
        )
    missing = [name for name in ("unet", "vae") if name not in stored]
    hint = "; give one with the option vae" if missing == ["vae"] else ""
    raise CheckpointError(f"got {', '.join(sorted(stored))}, but no {' and no '.join(missing)}{hint}")


def _unet_part(config: UNetConfig, stored: Stored, ema: bool) -> Part:
    with torch.device("meta"):
        shapes = folder_shapes(UNet(config).state_dict())
    if stored.layout == "folder":
        if ema:
            raise CheckpointError("option ema: a folder has no moving average")
        return Part("unet", config, stored, shapes, [Rule(key, (key,)) for key in shapes])
    rules = renamed(unet_modules(config), shapes, stored.prefix)
    if not ema:
        return Part("unet", config, stored, shapes, rules)
    moving = ema_rules(rules)
    if not any(rule.file in stored.weights.entries for rule in moving):
        raise CheckpointError("option ema: the file has no moving average (model_ema.*)")
    return Part("unet", config, stored, shapes, moving, dropped=(stored.prefix,))


def _vae_part(stored: Stored, family: Family, own: Stored | None) -> Part:
    config = detect_vae(
        stored.shapes(),
        stored.layout,
        stored.config,
        scale=FAMILIES[family].scale,
        force_upcast=FAMILIES[family].force_upcast,
    )
    with torch.device("meta"):
        shapes = folder_shapes(Autoencoder(config).state_dict())
    if stored.layout == "folder":
        rules = vae_folder_rules(shapes, stored.weights.entries)
    else:
        rules = renamed(vae_modules(config), shapes, stored.prefix)
    replaced = own is not None and own is not stored and bool(own.prefix)
    return Part("vae", config, stored, shapes, rules, dropped=(own.prefix,) if own and replaced else ())


def _text_part(
    checkpoint: Checkpoint, name: str, stored: Stored, family: Family
) -> tuple[Part, ClipTokenizer]:
    shapes, use = stored.shapes(), FAMILIES[family].text[name]
    openclip = stored.style == "openclip"
    # A whole OpenCLIP tower under SD2 has one block and a projection more than the family runs.
    drop = int(openclip and family in ("sd2", "x4-upscaler") and "text_projection" in shapes)
    tower = Tower(shapes, "openclip" if openclip else "clip", stored.prefix)
    tokenizer = checkpoint.tokenizer(name) or ClipTokenizer.openai()
    pad = checkpoint.pad_token(name)
    if pad is not None:
        if pad not in tokenizer.vocab:
            raise CheckpointError(f"{name}: the pad token {pad!r} is not in the tokenizer's vocabulary")
        use = replace(use, pad=tokenizer.vocab[pad])
    special = tokenizer.bos_id, tokenizer.eos_id
    config = detect_text(tower, use, stored.config, special=special, drop=drop)
    if tokenizer.vocab_size != config.vocab:
        raise CheckpointError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab} rows"
        )
    wanted = text_shapes(config)
    rules = (
        list(openclip_rules(config, stored.prefix))
        if openclip
        else clip_rules(wanted, stored.prefix, stored.weights.entries)
    )
    block = f"{stored.prefix}transformer.resblocks.{config.layers}."
    dropped = (block, f"{stored.prefix}text_projection") if drop else ()
    return Part(name, config, stored, wanted, rules, dropped), tokenizer


def _unused(checkpoint: Checkpoint, parts: Mapping[str, Part]) -> Iterator[str]:
    """Keys that no rule uses and no list ignores."""
    used: dict[int, set[str]] = {}
    dropped: list[str] = []
    for part in parts.values():
        used.setdefault(id(part.stored.weights), set()).update(rule.file for rule in part.rules)
        dropped += part.dropped
    for name, weights in checkpoint.weights.items():
        if id(weights) not in used and name == "vae":
            continue  # replaced by an option
        for key in sorted(weights.entries.keys() - used.get(id(weights), set())):
            if not key.startswith(tuple(dropped)) and not any(p.search(key) for p in _IGNORED):
                yield f"{name}: {key}" if name else key


def _model_config(
    checkpoint: Checkpoint, family: Family, parts: Mapping[str, Part], options: Options
) -> ModelConfig:
    unet, vae = parts["unet"].config, parts["vae"].config
    assert isinstance(unet, UNetConfig)
    assert isinstance(vae, VAEConfig)
    task, facts = task_of(unet, vae.latent_channels), FAMILIES[family]
    evidence = Evidence(
        scheduler=checkpoint.config("scheduler/scheduler_config.json"),
        metadata=checkpoint.metadata,
        markers=frozenset(_markers(checkpoint)),
        spread=lambda key: _spread(parts["unet"], key),
    )
    noise, decided_by = noise_of(family, task, unet, evidence, options)
    size = (checkpoint.config("unet/config.json") or {}).get("sample_size")
    index: Mapping[str, Any] = checkpoint.config("model_index.json") or {}
    return ModelConfig(
        family=family,
        task=task,
        unet=unet,
        vae=vae,
        text=tuple(part.config for part in parts.values() if isinstance(part.config, TextConfig)),
        noise=noise,
        defaults=defaults_of(family, task, noise, unet, vae.factor, evidence, size, options),
        zero_empty_negative=bool(index.get("force_zeros_for_empty_prompt", facts.zero_empty_negative)),
        aesthetic_score=bool(index.get("requires_aesthetics_score", facts.aesthetic_score)),
        prediction_decided_by=decided_by,
    )


def _markers(checkpoint: Checkpoint) -> Iterable[str]:
    prefixes = tuple(prefix for _, prefix, _ in SINGLE_PARTS)
    if checkpoint.layout == "folder":
        return ()
    return (key for key in checkpoint.weights[""].entries if not key.startswith(prefixes))


def _spread(part: Part, key: str) -> float | None:
    """Standard deviation of a tensor by its folder name."""
    for rule in part.rules:
        if key in rule.folder and rule.file in part.stored.weights.entries:
            return float(part.stored.weights.read(rule.file).float().std())
    return None
