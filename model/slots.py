"""The state of images that are being denoised together: one bucket of equal latent shape, text length and adapters.

A bucket keeps the solver state of its images in one tensor [slots, 6, C, h, w]: x, the saved x, three pushed
entries and the previous noise (see `samplers.py`). One call of `advance` moves them all by one table row
each, whatever their samplers, step counts and positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .conditioning import Branch
from .preparation import Blend, Prepared
from .sampling.samplers import COLUMNS

if TYPE_CHECKING:
    from .tickets import Ticket

X = 0
STATE_COLUMNS = [COLUMNS.index(name) for name in ("x", "base", "h1", "h2", "h3", "prev_noise")]
D_COLUMN, NOISE_COLUMN = COLUMNS.index("d"), COLUMNS.index("noise")
PUSH_X, PUSH_D = COLUMNS.index("push_x"), COLUMNS.index("push_d")


@dataclass(slots=True, eq=False)
class Slot:
    """One image on its way: its place in the bucket's state and its position in its table."""

    ticket: Ticket
    prepared: Prepared
    place: int
    row: int = 0
    denoised: Tensor | None = None

    @property
    def done(self) -> bool:
        return self.row >= len(self.prepared.table)

    @property
    def steps_done(self) -> int:
        """Whole sampler steps behind this image; a step may take two rows."""
        table = self.prepared.table
        return table.steps if self.done else int(table.step[self.row])

    @property
    def branches(self) -> tuple[Branch, ...]:
        """Network rows this image needs in its next step: the prompt's alone where guidance is off."""
        branches = self.prepared.conditioning.branches
        return branches if self._guided else branches[:1]

    @property
    def _guided(self) -> bool:
        table, request = self.prepared.table, self.prepared.request
        share = float(table.step[self.row]) / table.steps
        return request.guidance_start <= share < request.guidance_stop


class Bucket:
    """Images of one latent shape, text length and set of adapters, at most `capacity` at a time.

    Attributes:
        adapters: what the UNet is to be merged with.
    """

    def __init__(self, like: Prepared, capacity: int) -> None:
        self.state = like.x.new_zeros((capacity, 6, *like.x.shape), dtype=torch.float32)
        self.adapters = like.adapters
        self.slots: list[Slot] = []
        self.served = 0
        self._free = list(range(capacity))[::-1]

    @property
    def full(self) -> bool:
        return not self._free

    def add(self, ticket: Ticket, prepared: Prepared) -> Slot:
        slot = Slot(ticket, prepared, self._free.pop())
        self.state[slot.place] = 0
        self.state[slot.place, X] = prepared.x
        self.slots.append(slot)
        return slot

    def remove(self, slot: Slot) -> Tensor:
        """Take an image out; its x [C, h, w]."""
        self.slots.remove(slot)
        self._free.append(slot.place)
        return self.state[slot.place, X].clone()


Network = Callable[[Tensor, Tensor, Sequence[Branch]], Tensor]


def advance(bucket: Bucket, network: Network, prediction: str) -> None:
    """Move every image of a bucket by one table row.

    Everything from the host is sent before the network runs, and nothing is read back: on an accelerator the
    host prepares the next call while this one is computed.

    Args:
        network: (scaled latents [N, C, h, w], timesteps [N], branches) to raw outputs [N, C, h, w] float32.
        prediction: what the raw output means.
    """
    slots, device = list(bucket.slots), bucket.state.device
    rows = [(slot.prepared.table, slot.row) for slot in slots]
    branches = [slot.branches for slot in slots]
    counts = [len(own) for own in branches]
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    times = [float(rows[index][0].timesteps[rows[index][1]]) for index in owners]
    sigma = _column([float(table.sigmas[k]) for table, k in rows], device)
    coefficients = _upload(np.stack([table.coefficients[k] for table, k in rows]), device)
    saves = _column([bool(table.saves[k]) for table, k in rows], device)
    pushes = _column([bool(table.pushes[k]) for table, k in rows], device)
    draws = _column([bool(table.draws[k]) for table, k in rows], device)
    places = _upload([slot.place for slot in slots], device, torch.int64)
    owner, told = _upload(owners, device, torch.int64), _upload(times, device)

    state = bucket.state.index_select(0, places)  # [S, 6, C, h, w]
    x, base, h1, h2, h3, previous = state.unbind(1)
    noise = _noise(slots, x)
    scaled = x / (sigma**2 + 1).sqrt()
    raw = network(scaled.index_select(0, owner), told, [branch for own in branches for branch in own])
    outputs = torch.split_with_sizes(raw, counts)
    output = torch.stack([_combine(own, slot) for own, slot in zip(outputs, slots, strict=True)])
    denoised = to_denoised(x, output, sigma, prediction)
    new = _update(state, denoised, noise, coefficients)
    for index, (slot, (table, k)) in enumerate(zip(slots, rows, strict=True)):
        if slot.prepared.blend is not None:
            after = float(table.sigmas[k + 1]) if k + 1 < len(table) else table.final_sigma
            new[index] = _blended(slot.prepared.blend, new[index], after)
    push_x, push_d = (coefficients[:, column, None, None, None] for column in (PUSH_X, PUSH_D))
    entry = push_x * x + push_d * denoised
    kept = (
        new,
        torch.where(saves, x, base),
        torch.where(pushes, entry, h1),
        torch.where(pushes, h1, h2),
        torch.where(pushes, h2, h3),
        torch.where(draws, noise, previous),
    )
    bucket.state.index_copy_(0, places, torch.stack(kept, dim=1))
    for index, slot in enumerate(slots):
        slot.denoised = denoised[index]
        slot.row += 1


def to_denoised(x: Tensor, output: Tensor, sigma: Tensor, prediction: str) -> Tensor:
    """The x0 prediction D from a raw network output at x = x0 + sigma * noise (Salimans & Ho 2022)."""
    if prediction == "epsilon":
        return x - sigma * output
    if prediction == "v_prediction":
        return x / (sigma**2 + 1) - output * (sigma / (sigma**2 + 1).sqrt())
    return output


def _combine(outputs: Tensor, slot: Slot) -> Tensor:
    """Weighted sum of one image's branch outputs [B, C, h, w], then guidance rescale (Lin et al. 2023, 3.4)."""
    if len(outputs) == 1:
        return outputs[0]
    weights = slot.prepared.conditioning.weights
    total = outputs[0] * weights[0]
    for output, weight in zip(outputs[1:], weights[1:], strict=True):
        total = total + output * weight
    rescale = slot.prepared.request.guidance_rescale
    if rescale > 0:
        total = total * (rescale * outputs[0].std() / total.std() + (1 - rescale))
    return total


def _update(state: Tensor, denoised: Tensor, noise: Tensor, coefficients: Tensor) -> Tensor:
    """The table's linear combination, term by term so that each image's sum has a fixed order."""
    terms = [(state[:, i], column) for i, column in enumerate(STATE_COLUMNS)]
    terms += [(denoised, D_COLUMN), (noise, NOISE_COLUMN)]
    total = torch.zeros_like(denoised)
    for tensor, column in terms:
        total = torch.addcmul(total, coefficients[:, column, None, None, None], tensor)
    return total


def _noise(slots: Sequence[Slot], like: Tensor) -> Tensor:
    """Fresh unit noise from each image's own generator where its row draws, zeros elsewhere."""
    drawing = [slot.prepared.table.draws[slot.row] for slot in slots]
    if not any(drawing):
        return torch.zeros_like(like)
    noise = torch.zeros(like.shape)
    for index, slot in enumerate(slots):
        if drawing[index]:
            noise[index] = torch.randn(like.shape[1:], generator=slot.prepared.generator)
    return _sent(noise, like.device)


def _blended(blend: Blend, x: Tensor, sigma: float) -> Tensor:
    return blend.mask * x + (1 - blend.mask) * (blend.source + sigma * blend.noise)


def _column(values: list[float] | list[bool], device: torch.device) -> Tensor:
    dtype = torch.bool if isinstance(values[0], bool) else torch.float32
    return _upload(values, device, dtype)[:, None, None, None]


def _upload(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return _sent(torch.as_tensor(values, dtype=dtype), device)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on the device; from pinned memory the host need not wait for what runs there."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
