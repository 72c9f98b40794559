"""Who runs the jobs of one worker process: the main thread alone, or an event loop there and threads beside it.

The main thread belongs to user code: at concurrency 1 handlers run there, so that libraries which insist on the
main thread work, and a timeout interrupts even a sleeping one. Above 1 plain handlers have threads of their own and
async ones share the main thread's loop. Nobody here waits for a store; the clerk does.
"""

import asyncio
import inspect
import logging
import queue
import threading
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

from pmqd import interrupt
from pmqd.desk import Desk, Item, Stage
from pmqd.executor import Executor
from pmqd.logs import Edge

log = logging.getLogger(__name__)

THREAD_AGAIN_SECONDS: Final = 0.2
"""When a thread is tried again that could not be started."""


class Crew(Protocol):
    """What the worker's main function and its clerk know of those who run jobs."""

    def serve(self) -> None:
        """Runs jobs until `stop`; in the main thread."""

    def stop(self) -> None:
        """Ends `serve`, once what runs has ended. Any thread may call it."""


def make_crew(concurrency: int, executor: Executor, desk: Desk, runner: asyncio.Runner) -> Crew:
    """The crew for a pool's concurrency.

    Args:
        concurrency: jobs that may run at once.
        executor: what runs one.
        desk: where they come from; its `dispatch` is set here.
        runner: has the event loop for async handlers.
    """
    return Solo(executor, desk, runner) if concurrency == 1 else Ensemble(executor, desk, runner)


class Solo:
    """One job at a time, all in the main thread."""

    def __init__(self, executor: Executor, desk: Desk, runner: asyncio.Runner) -> None:
        self._executor = executor
        self._runner = runner
        self._inbox: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        desk.dispatch = self._inbox.put

    def serve(self) -> None:
        """Runs jobs until `stop`."""
        interrupt.listen()
        while (item := self._inbox.get()) is not None:
            following: Item | None = item
            while following is not None:
                following = self._run(following)

    def stop(self) -> None:
        """Ends `serve`."""
        self._inbox.put(None)

    def _run(self, item: Item) -> Item | None:
        return self._run_async(item) if item.task.is_async else self._executor.run_in_main(item)

    def _run_async(self, item: Item) -> Item | None:
        loop = self._runner.get_loop()
        ended: asyncio.Future[Item | None] = loop.create_future()
        loop.call_soon(self._executor.run_as_task, item, loop, ended.set_result)
        return loop.run_until_complete(ended)


class Ensemble:
    """Many jobs at once: a thread per place for plain handlers, made when first needed, and one loop for async ones."""

    def __init__(self, executor: Executor, desk: Desk, runner: asyncio.Runner) -> None:
        self._executor = executor
        self._desk = desk
        self._loop = runner.get_loop()
        self._inboxes: dict[int, queue.SimpleQueue[Item | None]] = {}
        self._short = Edge(log, "no thread can be started for a job", "threads can be started again")
        desk.dispatch = self._dispatch

    def serve(self) -> None:
        """Runs the event loop until `stop`."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            asyncio.set_event_loop(None)

    def stop(self) -> None:
        """Ends `serve` and the threads, once they are free."""
        for inbox in list(self._inboxes.values()):
            inbox.put(None)
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _dispatch(self, item: Item) -> None:
        """Any thread: the clerk with new jobs, a runner with the next job for its place."""
        if item.task.is_async:
            self._loop.call_soon_threadsafe(self._start_task, item)
            return
        inbox = self._inboxes.get(item.entry)
        if inbox is None:
            # Nobody else makes this one: a place has one job at a time, and this job has the place.
            inbox = self._new_runner(item)
        if inbox is not None:
            inbox.put(item)

    def _new_runner(self, item: Item) -> "queue.SimpleQueue[Item | None] | None":
        """A thread for a place; None where the system has none to give: then the job, and its place, wait for the next try."""
        inbox: queue.SimpleQueue[Item | None] = queue.SimpleQueue()
        runner = threading.Thread(
            target=self._serve_thread, args=(inbox,), name=f"runner-{item.entry}", daemon=True
        )
        try:
            runner.start()
        except RuntimeError as error:
            self._short.set(True, error)
            self._loop.call_soon_threadsafe(self._loop.call_later, THREAD_AGAIN_SECONDS, self._again, item)
            return None
        self._short.set(False)
        self._inboxes[item.entry] = inbox
        return inbox

    def _again(self, item: Item) -> None:
        if item.stage is Stage.WITHDRAWN:  # given back meanwhile: only its place is to be freed
            self._follow(self._desk.leave(item))
        else:
            self._dispatch(item)

    def _serve_thread(self, inbox: "queue.SimpleQueue[Item | None]") -> None:
        while (item := inbox.get()) is not None:
            following: Item | None = item
            while following is not None and not following.task.is_async:
                following = self._executor.run_in_thread(following)
            if following is not None:
                self._dispatch(following)

    def _start_task(self, item: Item) -> None:
        self._executor.run_as_task(item, self._loop, self._follow)

    def _follow(self, item: Item | None) -> None:
        if item is not None and item.task.is_async:
            self._loop.call_soon(self._start_task, item)  # not at once: the others on the loop come first
        elif item is not None:
            self._dispatch(item)


def run_hooks(hooks: Iterable[Callable[[], Any]], runner: asyncio.Runner) -> None:
    """Runs what the application wants done when a worker starts or stops; async hooks on the handlers' loop."""
    for hook in hooks:
        found = hook()
        if inspect.isawaitable(found):
            runner.run(_awaited(found))


async def _awaited(awaitable: Any) -> Any:
    return await awaitable
