"""The local engine of ``oag-transform purify``: batches of images by this process, or by several."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection

import torch

from . import saving, worker
from .sources import Job


def run(plan: worker.PurifyPlan, jobs: Sequence[Job], processes: int) -> Generator[list[worker.PurifyOutcome], None, None]:
    """Purify everything, and say what became of each batch as it is done.

    The processes share the processors' threads, and end with the iterator, or with this process, however it ends.

    Raises:
        ChildProcessError: a process was ended from outside.
    """
    work = worker.batches(jobs, plan.batch_size)
    if processes == 1:
        return (worker.purify_batch(plan, batch) for batch in work)
    return _parallel(plan, work, processes)


def _parallel(
    plan: worker.PurifyPlan, work: Iterator[Sequence[Job]], processes: int
) -> Generator[list[worker.PurifyOutcome], None, None]:
    context = multiprocessing.get_context("spawn")  # a fork of a process whose threads have worked may hang
    lifeline, held = context.Pipe(duplex=False)
    threads = max(1, worker.processors() // processes)
    pool = ProcessPoolExecutor(processes, context, _start, (lifeline, threads))
    running: dict[Future[list[worker.PurifyOutcome]], Sequence[Job]] = {}
    try:
        while True:
            for batch in itertools.islice(work, 2 * processes - len(running)):
                with _sigint_blocked():  # a process that starts now inherits that: Ctrl-C is for this one to handle
                    running[pool.submit(worker.purify_batch, plan, batch)] = batch
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcomes = future.result()
                del running[future]
                yield outcomes
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process ended in the middle of its work, for want of memory perhaps; fewer --jobs need less, and "
            "--skip-existing goes on from here"
        ) from error
    finally:
        held.close()
        pool.shutdown(cancel_futures=True)
        lifeline.close()
        for job in itertools.chain.from_iterable(running.values()):
            saving.partial_path(job.target, plan.token).unlink(missing_ok=True)


def _start(lifeline: Connection, threads: int) -> None:
    """Begin a process."""
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()  # nothing is ever sent: it returns when the other end is closed, or its process is gone
    os._exit(0)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
