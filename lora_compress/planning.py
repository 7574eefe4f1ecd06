"""What every module of a file gets: ranks, bits and steps, chosen over all of them at once."""

from __future__ import annotations

from .encoding import Choice
from .job import Job
from .pruning import select_ranks

__all__ = ["plan"]


def plan(job: Job, family: str = "unknown") -> dict[str, Choice]:
    """A choice for each module, in the order of the job."""
    scores = {name: analysis.spectrum.sigma for name, analysis in job.analyses.items()}
    kernels = {name: analysis.shape.kernel for name, analysis in job.analyses.items()}
    ranks = select_ranks(scores, job.settings.pruning, kernels)
    return {name: Choice(rank) for name, rank in ranks.items()}
