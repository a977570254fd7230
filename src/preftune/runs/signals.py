"""SIGTERM and SIGINT end a run with a checkpoint and a word on how to go on."""

import signal
import sys
import threading
import time

import torch
from transformers import TrainerCallback

from preftune.config.errors import Interrupted
from preftune.config.processes import main_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO = 3  # seconds in which a signal again is the same word: Slurm tells all processes of a job, and torchrun its ranks


class Interruption(TrainerCallback):
    """Holds the signals while a run lasts: within training the first one waits for the step's end and a checkpoint.

    Everywhere else, and the second time (but for an echo of the first), a signal ends the run at once; reference
    log-probs, findings and finished stages are on disk by then.
    """

    def __init__(self):
        self.signal, self.training, self._before, self._since = None, False, {}, 0.0

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        name = signal.Signals(number).name
        if number == self.signal and time.monotonic() - self._since < ECHO:
            return
        if not self.training or self.signal is not None:
            raise Interrupted(number, f"{name}: stopped; what was saved is kept")
        self.signal, self._since = number, time.monotonic()
        if main_process():  # each rank is signalled, and one speaks
            later = f"again, after {ECHO} s: at once"
            print(f"\n{name}: a checkpoint is saved after this step ({later})", file=sys.stderr, flush=True)

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
