"""pmqd: a pool of 2 processes with 50 slots each."""

import time

from benchmarks.peers import slots
from pmqd import App

app = App()


@app.task(queue="bench", name="job")
def job(number: int) -> None:
    """One job of the benchmark."""
    slots.start(number)
    time.sleep(slots.SLEEP)
    slots.end(number)
