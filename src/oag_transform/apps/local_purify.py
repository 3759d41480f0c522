"""The local engine of ``oag-transform purify``: one process or several purify batches of images."""

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
    """Purify all jobs, and yield the outcomes of each batch when it is done.

    The processes share the processors' threads. They end with the iterator, and with this process in any case.

    Raises:
        ChildProcessError: a process was killed.
    """
    work = worker.batches(jobs, plan.batch_size)
    if processes == 1:
        return (worker.purify_batch(plan, batch) for batch in work)
    return _parallel(plan, work, processes)


def _parallel(
    plan: worker.PurifyPlan, work: Iterator[Sequence[Job]], processes: int
) -> Generator[list[worker.PurifyOutcome], None, None]:
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    lifeline, parent_end = context.Pipe(duplex=False)
    threads = max(1, worker.processors() // processes)
    pool = ProcessPoolExecutor(processes, context, _start, (lifeline, threads))
    running: dict[Future[list[worker.PurifyOutcome]], Sequence[Job]] = {}
    try:
        while True:
            for batch in itertools.islice(work, 2 * processes - len(running)):
                with _sigint_blocked():  # inherited by processes that start now: only this one handles Ctrl-C
                    running[pool.submit(worker.purify_batch, plan, batch)] = batch
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                outcomes = future.result()
                del running[future]
                yield outcomes
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a process was killed, perhaps because memory ran out; fewer --jobs need less memory, and --skip-existing continues"
        ) from error
    finally:
        parent_end.close()
        pool.shutdown(cancel_futures=True)
        lifeline.close()
        for job in itertools.chain.from_iterable(running.values()):
            saving.remove_partial(job.target, plan.token)


def _start(lifeline: Connection, threads: int) -> None:
    """Initialise a process."""
    torch.set_num_threads(min(threads, torch.get_num_threads()))
    threading.Thread(target=_end_with, args=(lifeline,), daemon=True).start()


def _end_with(lifeline: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        lifeline.recv_bytes()  # nothing is sent: it returns when the other end closes, or its process ends
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
