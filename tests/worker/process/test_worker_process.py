"""A worker process runs one pipeline at a time and loses no nudge."""

import threading

from tests.conftest import PATIENCE_SECONDS, wait_until
from worker.process.worker_process import WorkerProcess, scorers_a_gpu
from worker.settings import Settings, load_settings


class Counting(WorkerProcess):
    """Work that waits for the test, and is counted."""

    kind = "counting"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, lambda: None)
        self.calls = self.closed = 0
        self.begun, self.go = threading.Event(), threading.Event()

    def work(self) -> int:
        self.calls += 1
        self.begun.set()
        assert self.go.wait(PATIENCE_SECONDS)
        return 1

    def close(self) -> None:
        self.closed += 1


def test_a_nudge_while_the_work_is_ending_is_worked_for(settings: Settings) -> None:
    worker = Counting(settings)
    thread = threading.Thread(target=worker.run)
    thread.start()
    assert worker.begun.wait(PATIENCE_SECONDS)
    assert [worker.run(), worker.run()] == [0, 0], "one run is active, the other nudges are only recorded"
    worker.go.set()
    thread.join(PATIENCE_SECONDS)
    assert worker.calls == 2, "two nudges during a run cause one more run"
    assert worker.run() == 1


def test_a_stopped_worker_is_closed_once_and_works_no_more(settings: Settings) -> None:
    idle = Counting(settings)
    idle.stop()
    assert (idle.run(), idle.calls, idle.closed) == (0, 0, 1)

    busy = Counting(settings)
    thread = threading.Thread(target=busy.run)
    thread.start()
    assert busy.begun.wait(PATIENCE_SECONDS)
    busy.run()
    busy.stop()
    assert busy.closed == 0, "its work is not finished"
    busy.go.set()
    wait_until(lambda: not thread.is_alive())
    assert (busy.run(), busy.calls, busy.closed) == (0, 1, 1)


def test_the_scoring_workers_of_up_are_divided_among_the_gpus_unless_a_number_is_set() -> None:
    assert [scorers_a_gpu(load_settings(scorers=8), gpus) for gpus in (0, 1, 2, 3, 16)] == [8, 8, 4, 3, 1]
    assert scorers_a_gpu(load_settings(scorers=8, gpu_scorers=2), 1) == 2
    assert scorers_a_gpu(load_settings(), 4) == 1
