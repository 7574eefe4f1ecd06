"""A batch on a Ray cluster: a task for each file, as many under way as the cluster has cores."""

from __future__ import annotations

import importlib
import os
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import LoraCompressError
from .jobs import CompressOptions, Job
from .storage import is_remote
from .work import Compress, run_job

__all__ = ["run_on_ray"]

_Outcomes = Generator[dict[str, Any], None, None]
_RETRIES = 2  # of a task whose node or process is lost


def run_on_ray(jobs: Sequence[Job], options: CompressOptions, compress: Compress | None = None) -> _Outcomes:
    """The outcome of every job (see `run_job`) as it comes, from the cluster of RAY_ADDRESS, or from this machine without one.

    Paths must mean the same on every node: a shared folder, or URLs that fsspec opens. The nodes need this package.

    Raises:
        LoraCompressError: ray is not installed, or there is no cluster at RAY_ADDRESS.
    """
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise LoraCompressError("--executor ray: ray is not installed: pip install ray, or use --executor local") from None
    started_here = not ray.is_initialized()
    try:
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise LoraCompressError(f"--executor ray: no cluster answers ({error}): check RAY_ADDRESS, or unset it") from error
    try:
        yield from _spread(ray, [_absolute(job) for job in jobs], options, compress)
    finally:
        if started_here:
            ray.shutdown()


def _spread(ray: Any, jobs: list[Job], options: CompressOptions, compress: Compress | None) -> _Outcomes:
    gpu = options.settings.quantization_device != "cpu"
    task = ray.remote(num_cpus=1, num_gpus=int(gpu), max_retries=_RETRIES)(run_job)
    most = 2 * max(int(ray.cluster_resources().get("CPU", 1)), 1)  # one in work and one waiting for each core
    waiting = jobs[::-1]
    running: dict[Any, Job] = {}
    while waiting or running:
        while waiting and len(running) < most:
            job = waiting.pop()
            running[task.remote(job, options, compress)] = job
        done, _ = ray.wait(list(running), num_returns=1)
        job = running.pop(done[0])
        try:
            yield ray.get(done[0])
        except ray.exceptions.RayError as error:
            message = f"{job.source}: its task was lost {_RETRIES + 1} times ({str(error).splitlines()[0]})"
            yield {"input": job.source, "output": None, "status": "failed", "error": message, "notes": []}


def _absolute(job: Job) -> Job:
    """Workers run in a folder of their own."""
    source, target = (path if is_remote(path) else os.path.abspath(path) for path in (job.source, job.target))
    return replace(job, source=source, target=target)
