"""The training noise schedule of a model: its noise levels (sigmas) and their timesteps.

With `a` the cumulative product of 1 - beta, `sigma = sqrt((1 - a) / a)`: a noisy latent is
`x = x0 + sigma * noise`. Arrays are float64 numpy.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..config import NoiseConfig

Floats = NDArray[np.float64]

TERMINAL_ALPHA = 2.0**-24
"""Stands in for the last `a`, 0 with zero terminal SNR: sigma 4096, as in diffusers' sigma samplers."""


class NoiseSchedule:
    """The training noise levels of a model.

    Attributes:
        config: what it was made from.
        alphas_cumprod: [T] float64 in (0, 1), descending with the timestep.
        sigmas: [T] float64, ascending with the timestep.

    The values, and the logarithms behind `timestep`, are rounded to float32 as in diffusers: `1 - a` feels
    it at small timesteps, and so do timesteps that are truncated afterwards.
    """

    def __init__(self, config: NoiseConfig) -> None:
        self.config = config
        alphas = _alphas_cumprod(config)
        self.alphas_cumprod = alphas.astype(np.float64)
        self.sigmas = np.sqrt((np.float32(1.0) - alphas) / alphas).astype(np.float64)
        self._log_sigmas = np.log(self.sigmas).astype(np.float32).astype(np.float64)
        self._timesteps = np.arange(config.train_steps, dtype=np.float64)

    @property
    def train_steps(self) -> int:
        """T, the number of training timesteps."""
        return self.config.train_steps

    @property
    def sigma_min(self) -> float:
        """The noise level of timestep 0."""
        return float(self.sigmas[0])

    @property
    def sigma_max(self) -> float:
        """The noise level of timestep T - 1."""
        return float(self.sigmas[-1])

    def sigma(self, timestep: ArrayLike) -> Floats:
        """Noise levels at (fractional) timesteps, linear in sigma as in diffusers; clamped to [0, T-1]."""
        return np.asarray(
            np.interp(np.asarray(timestep, dtype=np.float64), self._timesteps, self.sigmas), dtype=np.float64
        )

    def log_sigma(self, timestep: ArrayLike) -> Floats:
        """Logarithms of the noise levels at timesteps, linear in log sigma as in k-diffusion."""
        return np.asarray(
            np.interp(np.asarray(timestep, dtype=np.float64), self._timesteps, self._log_sigmas),
            dtype=np.float64,
        )

    def timestep(self, sigma: ArrayLike) -> Floats:
        """Fractional timesteps of noise levels, linear in log sigma; clamped to [0, T-1]."""
        logs = np.log(np.maximum(np.asarray(sigma, dtype=np.float64), 1e-10))
        return np.asarray(np.interp(logs, self._log_sigmas, self._timesteps), dtype=np.float64)


def _alphas_cumprod(config: NoiseConfig) -> NDArray[np.float32]:
    """[T] cumulative products, with the float32 betas and float64 accumulation of torch."""
    power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
    betas = _float32_ramp(config.beta_start**power, config.beta_end**power, config.train_steps)
    if config.beta_schedule == "scaled_linear":
        betas = betas * betas
    one = np.float32(1.0)
    cumprod = _cumprod(one - betas)
    if config.zero_terminal_snr:  # Lin et al. 2024, algorithm 1
        root = np.sqrt(cumprod)
        shifted = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        bar = shifted * shifted
        betas = one - np.append(bar[:1], bar[1:] / bar[:-1])
        cumprod = _cumprod(one - betas)
        cumprod[-1] = TERMINAL_ALPHA
    return cumprod


def _float32_ramp(start: float, end: float, count: int) -> NDArray[np.float32]:
    """`torch.linspace` in float32: counted from both ends, each product and sum rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(count - 1))
    index = np.arange(count)
    ramp = np.where(index < count // 2, float(first) + step * index, float(last) - step * (count - 1 - index))
    return ramp.astype(np.float32)


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.cumprod(alphas.astype(np.float64)).astype(np.float32)
