"""The controller in a training: measurements of a session go in, its ranks and bits change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import SettingsError
from ..evaluation.validation import comparable
from ..settings import AdaptiveSettings, CompressionSettings
from .controller import Compression, decide
from .session import TrainingSession

__all__ = ["SessionController"]


class SessionController:
    """Decides after each evaluation of a training how its session goes on, by `adaptive.decide`.

    An evaluation is an entry of a history: {"step": 40, "probe_fd": 31.2, "probe_fd_floor": 20.5}. What is said here is added: the
    number of steps, rank_ratio, bits and strategy that were measured, an action (relax, compress or keep) with its reason, and, if
    something changes, the rank_ratio, bits and strategy that come next. So a history is all that is needed to go on.

    Until the schedules of pruning and quantization have come to their end, and once scales are frozen, nothing is decided.

    Args:
        session: of the training; must quantize in the forward pass for bits to change.
        settings: of the section [adaptive]; its metric names a value of the entries, to which <metric>_floor and _full belong.

    Raises:
        SettingsError: the session cannot change its ranks, or a target does.
    """

    def __init__(self, session: TrainingSession, settings: AdaptiveSettings) -> None:
        training, pruning = session.settings.training, session.settings.pruning
        if not (training.iterative_pruning and training.rank_return):
            raise SettingsError(["[adaptive] needs iterative_pruning=true and rank_return=true: what was masked may come back"])
        if pruning.rank_ratio >= 1.0:
            raise SettingsError(["[adaptive] changes rank_ratio: give one below 1 to begin with"])
        if session.settings.budget.enabled:
            raise SettingsError(["[adaptive] and a target both decide about ranks: give rank_ratio and bits to begin with"])
        session.adaptable = True
        self.session, self.settings = session, settings
        session.remarks["adaptive"] = settings.mode

    @property
    def wants_full(self) -> bool:
        """Whether entries should have the metric of the uncompressed weights too; see `TrainingSession.uncompressed`."""
        return self.settings.mode == "fid_gap" and self.session.settled

    @property
    def compression(self) -> Compression:
        """In use."""
        settings = self.session.settings
        bits = settings.quantization.bits if settings.quantized_training.qat else None
        return Compression(settings.pruning.rank_ratio, bits, settings.quantization.strategy)

    def decide(self, history: Sequence[Mapping[str, Any]], entry: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be added to `entry`, the newest; `history` has those before it. Changes nothing."""
        session = self.session
        if not session.settled:
            return {"action": "keep", "reason": "pruning and quantization are still on their way"}
        now = self.compression
        told = {"optimizer_steps": session.step, **_as_entry(now)}
        assert session.timeline is not None
        if session.step >= session.timeline.frozen:
            return told | {"action": "keep", "reason": "scales are frozen"}
        decided = [each for each in (*history, {**entry, **told}) if "rank_ratio" in each]
        measured = [self._read(each) if "error" in each or comparable(each, entry) else None for each in decided]
        decision = decide(measured, now, self.settings)
        told |= {"action": decision.action, "reason": decision.reason}
        return told | ({"next": _as_entry(decision.compression)} if decision.compression != now else {})

    def apply(self, entry: Mapping[str, Any]) -> None:
        """Do what the newest entry says, from the next step on; in every process."""
        if "next" in entry:
            self.session.adapt(self._settings(entry["next"]))
            self._remark(entry)

    def restore(self, history: Sequence[Mapping[str, Any]]) -> None:
        """Go on where a history ends, after the session's own state has been loaded."""
        self.session.remarks.pop("adaptive_changes", None)
        for entry in history:
            if "next" in entry and entry["optimizer_steps"] < self.session.step:
                self.session.use(self._settings(entry["next"]))
                self._remark(entry)
            else:
                self.apply(entry)

    def _remark(self, entry: Mapping[str, Any]) -> None:
        remarks = self.session.remarks
        told = f"step {entry['step']}: {entry['reason']}"
        remarks["adaptive_changes"] = f"{remarks['adaptive_changes']}; {told}" if "adaptive_changes" in remarks else told

    def _read(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        metric = self.settings.metric
        names = {f"{metric}{kind}": f"{metric}{kind}" for kind in ("", "_interval", "_jackknife", "_full", "_full_jackknife")}
        names |= {f"{metric}_floor": "floor", "pictures": "pictures"}
        return {new: entry[old] for old, new in names.items() if old in entry} | {
            name: entry[name] for name in ("rank_ratio", "bits") if entry[name] is not None
        }

    def _settings(self, chosen: Mapping[str, Any]) -> CompressionSettings:
        settings = self.session.settings
        pruning = replace(settings.pruning, rank_ratio=chosen["rank_ratio"])
        if chosen["bits"] is None:
            return replace(settings, pruning=pruning)
        return replace(
            settings, pruning=pruning, quantization=replace(settings.quantization, bits=chosen["bits"], strategy=chosen["strategy"])
        )


def _as_entry(compression: Compression) -> dict[str, Any]:
    return {"rank_ratio": compression.rank_ratio, "bits": compression.bits, "strategy": compression.strategy}
