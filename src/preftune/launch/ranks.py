"""torchrun with plain words: `python -m preftune.launch.ranks OPTIONS -m MODULE …` starts the ranks of one machine.

It is torch.distributed.run, with three differences: it says in one line which rank ended first and how, in the place of
torchrun's table; it ends with that rank's exit code; and it ends when the process that started it does.
"""

import logging
import os
import signal
import sys
import threading
import time

from torch.distributed import DistError, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError


def main() -> None:
    """Run the ranks to their end, and exit with the code of the first that failed (128 + signal of a killed one)."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):  # Slurm sends it to all processes, and it is meant for the first
        signal.signal(number, signal.SIG_IGN)  # the ranks inherit that
    threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # its account of the same; the ranks speak for themselves
    arguments = run.parse_args(sys.argv[1:])
    try:
        run.run(arguments)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except (RendezvousError, DistError) as error:
        meeting = arguments.rdzv_endpoint or f"{arguments.master_addr}:{arguments.master_port}"
        sys.exit(
            f"the machines of this run have not met at {meeting}, or the one where they did has left "
            f"({type(error).__name__}): start all of them, or see what that one says"
        )
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if arguments.nproc_per_node != "1":
            print(f"rank {rank} ended first ({how}); the others were stopped", file=sys.stderr)
        elif code < 0:
            print(f"the process was {how}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)


def end_with(parent: int) -> None:
    """Send this process a SIGTERM once its parent is gone, even by SIGKILL, so that no rank is left behind."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
