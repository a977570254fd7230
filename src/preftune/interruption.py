"""SIGTERM and SIGINT end a run with a checkpoint and a word on how to go on."""

import signal
import sys
import threading

import torch
from transformers import TrainerCallback

from preftune.errors import Interrupted
from preftune.runs import main_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption(TrainerCallback):
    """Holds the signals while a run lasts: within training the first one waits for the step's end and a checkpoint.

    Everywhere else, and the second time, a signal ends the run at once; reference log-probs, findings and finished
    stages are on disk by then.
    """

    def __init__(self):
        self.signal, self.training, self._before = None, False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind, error, traceback) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        name = signal.Signals(number).name
        if not self.training or self.signal is not None:
            raise Interrupted(number, f"{name}: stopped. Go on with the same command and resume=true")
        self.signal = number
        if main_process():  # each rank is signalled, and one speaks
            print(f"\n{name}: a checkpoint is saved after this step (again: at once)", file=sys.stderr, flush=True)

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self._any_rank():
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False

    def on_train_end(self, args, state, control, **kwargs):
        self.training = False

    def _any_rank(self) -> bool:
        """Whether any rank was signalled: all must stop after the same step."""
        if not torch.distributed.is_initialized():
            return self.signal is not None
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        flag = torch.tensor(float(self.signal or 0), device=device)
        torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self.signal = int(flag.item()) or None
        return self.signal is not None
