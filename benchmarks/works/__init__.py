"""What is measured: one module per kind of work."""

from typing import Final

from benchmarks.works.backlog import BACKLOG, MEMORY
from benchmarks.works.drain import DRAIN
from benchmarks.works.enqueue import ENQUEUE
from benchmarks.works.idle import IDLE
from benchmarks.works.pickup import FLOOD, HALF, PICKUP
from benchmarks.works.sizes import SIZES
from benchmarks.works.sleep import SLEEP

_ALL = (DRAIN, PICKUP, FLOOD, HALF, SLEEP, IDLE, BACKLOG, ENQUEUE, *SIZES, MEMORY)
WORKS: Final = {work.name: work for work in _ALL}
