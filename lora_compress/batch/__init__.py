"""Many files at once: what there is to do, what is done already, and who does the rest."""

from .jobs import CompressOptions, Job, is_batch, plan_jobs
from .local import run_local, worker_count
from .on_ray import run_on_ray
from .work import run_job

__all__ = ["CompressOptions", "Job", "is_batch", "plan_jobs", "run_job", "run_local", "run_on_ray", "worker_count"]
