"""Dynamic batching: tasks of the same kind and size that wait at the same time share a batch."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    item: Item
    future: "Future[Result]" = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[Key, Item, Result]):
    """Threads that process items in batches of equal keys.

    A batch starts when ``size`` items of its key wait, or when the first has waited for ``wait`` seconds. The batch with the
    oldest first item starts first. If a batch fails, its items are processed one by one, so that only a bad item fails.

    Args:
        work: (key, items) -> a result for each of them, called in a thread of the batcher.
        size: largest number of items in a batch.
        wait: longest wait of an item for others, in seconds.
        workers: number of threads.
    """

    def __init__(
        self, work: Callable[[Key, Sequence[Item]], Sequence[Result]], *, size: int, wait: float, workers: int
    ) -> None:
        self._work, self._size, self._wait = work, size, wait
        self._waiting: dict[Key, list[_Job[Item, Result]]] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._threads = [threading.Thread(target=self._run, name=f"work-{i}", daemon=True) for i in range(workers)]
        for thread in self._threads:
            thread.start()

    def __len__(self) -> int:
        """Number of waiting items."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def submit(self, key: Key, item: Item) -> "Future[Result]":
        """Queue an item and return the future of its result. An item that is cancelled while it waits is not processed.

        Raises:
            RuntimeError: the batcher is closed.
        """
        job: _Job[Item, Result] = _Job(item)
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._waiting.setdefault(key, []).append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda future: self._forget(key, job) if future.cancelled() else None)
        return job.future

    def close(self) -> None:
        """Cancel waiting items, and stop the threads after their present batch."""
        with self._changed:
            self._closing = True
            left = [job for jobs in self._waiting.values() for job in jobs]
            self._waiting.clear()
            self._changed.notify_all()
        for job in left:
            job.future.cancel()
        for thread in self._threads:
            thread.join()

    def alive(self) -> bool:
        """Whether all threads are alive."""
        return all(thread.is_alive() for thread in self._threads)

    def _forget(self, key: Key, job: _Job[Item, Result]) -> None:
        with self._changed:
            if job in self._waiting.get(key, ()):
                self._waiting[key].remove(job)
                if not self._waiting[key]:
                    del self._waiting[key]

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            key, jobs = batch
            running = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if running:
                self._answer(key, running)

    def _take(self) -> tuple[Key, list[_Job[Item, Result]]] | None:
        """Wait for the next batch; None when the batcher is closed."""
        with self._changed:
            while not self._closing:
                now = time.monotonic()
                due = {
                    key: jobs[0].since if len(jobs) >= self._size else jobs[0].since + self._wait
                    for key, jobs in self._waiting.items()
                }
                ripe = [key for key, moment in due.items() if moment <= now]
                if not ripe:
                    self._changed.wait(min(due.values()) - now if due else None)
                    continue
                key = min(ripe, key=lambda each: self._waiting[each][0].since)
                jobs = self._waiting.pop(key)
                if jobs[self._size :]:
                    self._waiting[key] = jobs[self._size :]
                    self._changed.notify()  # another thread may take those
                return key, jobs[: self._size]
        return None

    def _answer(self, key: Key, jobs: Sequence[_Job[Item, Result]]) -> None:
        try:
            results = list(zip(jobs, self._work(key, [job.item for job in jobs]), strict=True))
        except Exception as error:  # any error goes to those who wait, and the thread goes on
            if len(jobs) == 1:
                jobs[0].future.set_exception(error)
                return
            for job in jobs:
                self._answer(key, [job])
            return
        for job, result in results:
            job.future.set_result(result)
