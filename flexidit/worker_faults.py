"""Processes that read data and failed: what happened in one sentence, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator

_GO_ON = "; go on with --ckpt_path last"
_CAUSES = {
    "Killed": "most likely the host ran out of memory: lower data.num_workers, data.batch_size or data.shuffle_buffer, "
    "or ask for more memory",
    "Bus error": "a file was cut or its disk went away while it was read, or /dev/shm is full: restore the file, or "
    "lower data.num_workers",
    "Segmentation fault": "a decoder broke on one of the files: try data.num_workers 0 to see which",
}
_SIGNAL = re.compile(r"DataLoader worker \(pid (\d+)\) is killed by signal: ([^.]*)\.")
_EXIT = re.compile(r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) exited unexpectedly")
_RAISED = re.compile(r"^Caught \w+ in DataLoader worker process")
_TOLD = (ValueError, OSError)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from: the loader covers the signal with less."""
    while error is not None:
        yield error
        error = error.__cause__


def is_broken_handover(error: BaseException) -> bool:
    """Whether a process died while it handed a batch over: its signal is known a moment later."""
    is_gone = isinstance(error, FileNotFoundError) and error.filename is None  # the socket that it handed over through
    return isinstance(error, (ConnectionError, EOFError)) or is_gone


def explain_worker(error: BaseException) -> Exception | None:
    """The sentence for users where torch's loader says that one of its processes failed; None for other errors.

    A process that dies is noticed by a signal handler, which raises wherever the main process happens to be.

    Example:
        >>> print(explain_worker(RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is ...")))
        process 7, which read data, died (Bus error): a file was cut or its disk went away while it was read, or \
/dev/shm is full: restore the file, or lower data.num_workers; go on with --ckpt_path last
        >>> print(explain_worker(ValueError("Caught ValueError in DataLoader worker process 0.\\nValueError: No.")))
        No.
        >>> explain_worker(ValueError("no patch size"))
    """
    text = str(error)
    if found := next(filter(None, (_SIGNAL.search(str(one)) for one in _chain(error))), None):
        cause = _CAUSES.get(found[2], "look for its reason in the system's log")
        return OSError(f"process {found[1]}, which read data, died ({found[2]}): {cause}{_GO_ON}")
    if found := _EXIT.search(text):
        return OSError(f"process {found[1]}, which read data, ended without a word: {_CAUSES['Killed']}{_GO_ON}")
    if is_broken_handover(error) and not _RAISED.match(text):
        return OSError(f"a process that read data ended while it handed over a batch: {_CAUSES['Killed']}{_GO_ON}")
    if isinstance(error, _TOLD) and _RAISED.match(text):  # the whole traceback, with the sentence at its end
        kind = next(kind for kind in _TOLD if isinstance(error, kind))
        return kind(text.rstrip().rpartition(f"{type(error).__name__}: ")[2])
    return None
