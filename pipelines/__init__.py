"""Batch jobs on Ray: a table of prompts becomes a dataset of images.

    from diffray.pipelines import JobConfig, run

    result = run(JobConfig(input="prompts.csv", output="out"))

Read `job.py` first.
"""

from . import arrival  # noqa: F401  first of all, it takes the time
from .checks import Checks, Scorer
from .config import InvalidJob, JobConfig
from .job import JobResult, run
from .making.pools import Pulse
from .models import Models, OpenModel
from .options import Between, Encoding, ModelOptions, ShardLimits, Workers
from .outputs.store import Store
from .planning.preview import Preview, preview
from .processor import Processor, ProcessorConfig, build_processor
from .progress import Progress, for_this_terminal
from .schema import job_schema
from .terms.values import request_from
from .upkeep.care import collect, repair, retry_rejected
from .upkeep.status import JobStatus, job_status
from .upkeep.verification import Fault, Verification, verify

__all__ = [
    "Between",
    "Checks",
    "Encoding",
    "Fault",
    "InvalidJob",
    "JobConfig",
    "JobResult",
    "JobStatus",
    "ModelOptions",
    "Models",
    "OpenModel",
    "Preview",
    "Processor",
    "ProcessorConfig",
    "Progress",
    "Pulse",
    "Scorer",
    "ShardLimits",
    "Store",
    "Verification",
    "Workers",
    "build_processor",
    "collect",
    "for_this_terminal",
    "job_schema",
    "job_status",
    "preview",
    "repair",
    "request_from",
    "retry_rejected",
    "run",
    "verify",
]
