"""Batch jobs on Ray: a table of prompts becomes a dataset of images.

    from diffray.pipelines import JobConfig, run

    result = run(JobConfig(input="prompts.csv", output="out"))

Read `job.py` first.
"""

from . import arrival  # noqa: F401  first of all, it takes the time
from .config import Encoding, InvalidJob, JobConfig, ModelOptions, ShardLimits, Workers
from .job import JobResult, run
from .models import Models, OpenModel
from .processor import Processor, ProcessorConfig, build_processor
from .progress import for_this_terminal
from .status import JobStatus, job_status
from .store import Store
from .values import request_from

__all__ = [
    "Encoding",
    "InvalidJob",
    "JobConfig",
    "JobResult",
    "JobStatus",
    "ModelOptions",
    "Models",
    "OpenModel",
    "Processor",
    "ProcessorConfig",
    "ShardLimits",
    "Store",
    "Workers",
    "build_processor",
    "for_this_terminal",
    "job_status",
    "request_from",
    "run",
]
