"""The Stable Diffusion family in plain torch: checkpoints in, images out. No Ray, no HTTP, no datasets.

from diffray.model import Engine, ImageRequest, load_model
model = load_model("sd_xl_base_1.0.safetensors")
Engine(model).generate([ImageRequest(prompt="a red fox", seed=7)])[0].save("fox.png")
"""

from .adapters.choices import AdapterChoice, adapter_choices, prompt_adapters
from .config import ModelConfig
from .engine import Engine
from .errors import (
    AccountingError,
    Cancelled,
    CheckpointError,
    DiffrayError,
    GenerationError,
    InvalidRequest,
    JobConflict,
    JobError,
    OutOfMemory,
    UnsafeCheckpoint,
)
from .request import ImageRequest
from .tickets import Result, Ticket
from .weights.convert import convert
from .weights.inspection import Inspection, inspect_source
from .weights.load import Model, load_model, model_config

__all__ = [
    "AccountingError",
    "AdapterChoice",
    "Cancelled",
    "CheckpointError",
    "DiffrayError",
    "Engine",
    "GenerationError",
    "ImageRequest",
    "Inspection",
    "InvalidRequest",
    "JobConflict",
    "JobError",
    "Model",
    "ModelConfig",
    "OutOfMemory",
    "Result",
    "Ticket",
    "UnsafeCheckpoint",
    "adapter_choices",
    "convert",
    "inspect_source",
    "load_model",
    "model_config",
    "prompt_adapters",
]
