"""The worker child: imports the application, runs its jobs, drains when it is told to.

The main thread belongs to the handlers (`crew`), one more thread does all input and output (`clerk`). What a worker
cannot import it says in one line and ends before it is ready, so that the master's back-off sees it.
"""

import asyncio
import gc
import importlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final
from uuid import UUID

from pmqd import batching, fence, recovery, served
from pmqd.clerk import Clerk, Post
from pmqd.client import App
from pmqd.crashpoints import bound_checkpoint
from pmqd.crew import make_crew, run_hooks
from pmqd.desk import Desk
from pmqd.errors import ExitCode, PmqdError
from pmqd.executor import Executor
from pmqd.job import Outcome
from pmqd.process import ChildContext
from pmqd.settings import PoolSettings
from pmqd.store import Store

log = logging.getLogger(__name__)

GC_YOUNG: Final = 50_000
"""After how many new objects the collector looks for cycles: a batch of quick jobs alone makes more than Python's 700."""


class AppError(PmqdError):
    """The pool's application cannot be imported or started."""


def main(context: ChildContext) -> int:
    """Runs one worker from its first to its last job.

    Args:
        context: what the master gives a child.

    Returns:
        0 after a clean drain, else the exit code of what went wrong.
    """
    assert context.pool is not None
    sys.setswitchinterval(batching.SWITCH_SECONDS)
    gc.set_threshold(GC_YOUNG)
    with asyncio.Runner() as runner:
        try:
            app = load_app(context.pool)
            app.use(context.settings)
            _run_start_hooks(app, context.pool, runner)
            _tell_served(context, context.pool, app)
        except AppError as error:
            log.error("%s", error)  # noqa: TRY400 - it says all in its one line
            return error.exit_code
        code = _work(context, context.pool, app, runner)
        return max(code, _run_stop_hooks(app, runner))


def load_app(pool: PoolSettings) -> App:
    """The application of a pool, imported.

    Args:
        pool: its `app` is "module:attribute".

    Raises:
        AppError: It cannot be imported, or is no App; names the pool, the app and the cause.
    """
    module_name, _, attribute = pool.app.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, and a console script does not
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (Exception, SystemExit) as error:
        raise AppError(f"pool {pool.name}: app {pool.app!r} cannot be imported: {_cause(error)}") from error
    if not isinstance(found, App):
        raise AppError(
            f"pool {pool.name}: app {pool.app!r} is a {type(found).__name__}; a pmqd.App is needed"
        )
    return found


def _cause(error: BaseException) -> str:
    """An error and the line where it was raised, as one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    where = f" ({own[-1].filename}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{where}"


def _run_start_hooks(app: App, pool: PoolSettings, runner: asyncio.Runner) -> None:
    try:
        run_hooks(app.registry.start_hooks, runner)
    except (Exception, SystemExit) as error:
        raise AppError(f"pool {pool.name}: a start hook of {pool.app!r} failed: {_cause(error)}") from error


def _run_stop_hooks(app: App, runner: asyncio.Runner) -> int:
    try:
        run_hooks(app.registry.stop_hooks, runner)
    except (Exception, SystemExit):
        log.exception("a stop hook failed")
        return ExitCode.FAILED
    return ExitCode.OK


def _work(context: ChildContext, pool: PoolSettings, app: App, runner: asyncio.Runner) -> int:
    """Between the hooks: the runners here, the clerk beside them."""
    bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    post = _post(context, pool, app, bell)
    desk = Desk(pool.concurrency, context.slot, post.ring)
    executor = Executor(
        desk,
        context.slot,
        context.worker_id,
        context.settings.timeout_grace_seconds,
        lambda: Store(context.settings.postgres, "handler", newest=context.arena),
        idle_stores=min(pool.concurrency, 4),
        checkpoint=post.checkpoint,
        may_start=lambda asked: fence.may_start(context.arena, asked),
    )
    crew = make_crew(pool.concurrency, executor, desk, runner)
    codes: list[int] = []

    def keep_books() -> None:
        try:
            codes.append(_run_clerk(post, desk, executor))
        finally:
            crew.stop()

    clerk = threading.Thread(target=keep_books, name="clerk", daemon=True)
    served.tell(context.state_dir, pool.name, app.registry.queues(), app.registry.kinds())
    context.arena.ring(context.arena.bell_maintenance)
    context.report_ready()
    clerk.start()
    crew.serve()
    clerk.join()
    executor.close()
    os.close(bell)
    return codes[0] if codes else ExitCode.FAILED


def _tell_served(context: ChildContext, pool: PoolSettings, app: App) -> None:
    """Before this worker is ready: nothing is marked for queues and kinds that nobody is known to serve."""
    missing = sorted(set(pool.queues) - set(app.registry.queues()))
    if missing:
        log.warning(
            "pool %s serves queues for which %s has no handler: %s", pool.name, pool.app, ", ".join(missing)
        )
    try:
        served.tell(context.state_dir, pool.name, app.registry.queues(), app.registry.kinds())
    except OSError as error:
        raise AppError(
            f"pool {pool.name}: what it serves cannot be written to {context.state_dir}: {error}"
        ) from error
    context.arena.ring(context.arena.bell_maintenance)


def _post(context: ChildContext, pool: PoolSettings, app: App, bell: int) -> Post:
    path = recovery.settles_path(context.state_dir, context.worker_id)

    def save(outcomes: Sequence[Outcome], closed: Sequence[UUID]) -> None:
        if not outcomes:
            path.unlink(missing_ok=True)  # maintenance may have taken it
            return
        try:
            recovery.save_outcomes(path, outcomes, closed)
        except OSError as error:
            log.error("%d settles cannot be written to %s: %s", len(outcomes), path, error)  # noqa: TRY400
        else:
            log.warning("%d settles that PostgreSQL could not take are kept in %s", len(outcomes), path)

    return Post(
        settings=context.settings,
        pool=pool,
        pool_index=context.pool_index,
        queues=pool.queues or app.registry.queues(),
        registry=app.registry,
        arena=context.arena,
        slot=context.slot,
        worker_id=context.worker_id,
        stop=context.stop,
        bell=bell,
        max_jobs=context.max_jobs,
        checkpoint=bound_checkpoint(),
        save=save,
    )


def _run_clerk(post: Post, desk: Desk, executor: Executor) -> int:
    clerk = Clerk(post, desk, executor)
    try:
        clerk.run()
    except PmqdError as error:  # the schema is not ours, or a setting is bad: no use in going on
        log.error("%s", error)  # noqa: TRY400 - it says all in its one line
        return error.exit_code
    except Exception:
        log.exception("the clerk ends after an error that it did not expect")
        return ExitCode.FAILED
    finally:
        clerk.close()
    return ExitCode.OK
