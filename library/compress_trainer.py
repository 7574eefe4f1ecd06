"""What is mixed into a trainer of sd-scripts: the numbers of the compression for the trackers, and states that are whole."""

from __future__ import annotations

import argparse
from typing import Any

from library.compress_resume import guard_states

__all__ = ["CompressTrainerMixin"]


class CompressTrainerMixin:
    """Goes before a NetworkTrainer of sd-scripts (v0.10.0 to v0.11.1) among the bases of a trainer."""

    _accelerator: Any = None
    _network: Any = None

    def post_process_network(self, args: argparse.Namespace, accelerator: Any, network: Any, *rest: Any) -> None:
        """The host's; then guards the states.

        The host closes the trackers before it saves the last file: they are kept open until that has been measured.
        """
        super().post_process_network(args, accelerator, network, *rest)  # type: ignore[misc]
        self._accelerator, self._network = accelerator, network
        guard_states(args, accelerator, network)
        accelerator.end_training = lambda: None

    def train(self, args: argparse.Namespace) -> None:
        """The host's training, then the report of the last save to TensorBoard, W&B or whatever is tracking."""
        super().train(args)  # type: ignore[misc]
        if self._accelerator is None:
            return
        del self._accelerator.end_training  # the class's own again
        report = getattr(self._network, "report", None)
        if report is not None and self._accelerator.trackers:
            self._accelerator.log(report.metrics(), step=args.max_train_steps)
        self._accelerator.end_training()
