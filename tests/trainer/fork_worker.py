"""Runs trainings of train_network_ext.py one after the other in forks of one process, which imports everything once.

Read from stdin as JSON: a list of trainings, each a list of processes, each {"argv": [...], "environment": {...}}; those of one
training run at the same time. Prints the exit statuses.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def leave_frozen_models_alone() -> None:
    """On CPUs accelerate wants to spread models that are not trained over processes too, which fails; on GPUs it does not."""
    from accelerate import Accelerator

    prepare = Accelerator.prepare_model

    def prepare_model(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        learns = any(parameter.requires_grad for parameter in model.parameters())
        return prepare(self, model, *args, **kwargs) if learns else model

    Accelerator.prepare_model = prepare_model  # type: ignore[method-assign]


def main() -> None:
    sys.path.insert(0, str(ROOT))
    os.chdir(ROOT)
    import train_network_ext

    for module in ("train_network", "lora_compress.evaluation.validation"):
        __import__(module)
    statuses = []
    for processes in json.load(sys.stdin):
        children = []
        for process in processes:
            child = os.fork()
            if child == 0:
                os.dup2(os.open(process["log"], os.O_WRONLY | os.O_CREAT), 1)
                os.dup2(1, 2)
                os.environ |= process["environment"]
                leave_frozen_models_alone()
                sys.argv = ["train_network_ext.py", *process["argv"]]
                try:
                    status = train_network_ext.main()
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    status = 1
                sys.stdout.flush()
                os._exit(status)
            children.append(child)
        statuses.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
