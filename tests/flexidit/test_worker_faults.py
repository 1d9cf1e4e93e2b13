"""What torch's loader says of its processes, in one sentence that says what to do."""

from __future__ import annotations

import pytest

from flexidit.worker_faults import explain_worker

SAID = {
    "DataLoader worker (pid 12) is killed by signal: Killed. ": "process 12, .* died \\(Killed\\): .* out of memory",
    "DataLoader worker (pid 12) is killed by signal: Bus error. It is possible that": "died \\(Bus error\\): a file",
    "DataLoader worker (pid 12) is killed by signal: Segmentation fault. ": "num_workers 0 to see which",
    "DataLoader worker (pid 12) is killed by signal: Aborted. ": "died \\(Aborted\\): look for its reason",
    "DataLoader worker (pid(s) 3, 12) exited unexpectedly": "process 3, 12, which read data, ended without a word",
    "DataLoader worker (pid 12) exited unexpectedly with exit code 1. Details are lost": "process 12, .* without a",
}


@pytest.mark.parametrize(("said", "expected"), SAID.items())
def test_a_process_that_died(said: str, expected: str) -> None:
    with pytest.raises(OSError, match=expected) as raised:
        raise explain_worker(RuntimeError(said)) or AssertionError
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("go on with --ckpt_path last")


def test_the_signal_behind_an_exit_is_what_counts() -> None:
    error = RuntimeError("DataLoader worker (pid(s) 12) exited unexpectedly")
    error.__cause__ = RuntimeError("DataLoader worker (pid 12) is killed by signal: Killed. ")
    assert "(Killed)" in str(explain_worker(error))


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), FileNotFoundError(2, "No such file")]
)
def test_a_batch_that_was_not_handed_over(error: Exception) -> None:
    assert "ended while it handed over a batch: most likely the host ran out of memory" in str(explain_worker(error))
    assert explain_worker(FileNotFoundError(2, "No such file", "a.jpg")) is None
    raised = ConnectionResetError(
        "Caught ConnectionResetError in DataLoader worker process 0.\nConnectionResetError: net"
    )
    assert str(explain_worker(raised)) == "net"


@pytest.mark.parametrize("error", [RuntimeError("Error(s) in loading state_dict"), ValueError("no"), KeyError("x")])
def test_other_errors_are_not_touched(error: Exception) -> None:
    assert explain_worker(error) is None
