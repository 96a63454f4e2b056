"""Exit codes of a worker process, and how they are described to users."""

import signal

# Codes 70, 71 and 75 follow sysexits.h: an internal error, one of the system, and a failure that a restart may resolve.
BAD_SETTINGS_EXIT = 2
POLLER_DIED_EXIT = 70
DEVICE_LOST_EXIT = 71
STALLED_EXIT = 75
GRACE_EXIT = 76
DESCRIPTIONS = {
    BAD_SETTINGS_EXIT: "it could not start",
    POLLER_DIED_EXIT: "a thread it depends on died",
    DEVICE_LOST_EXIT: "its device no longer computes",
    STALLED_EXIT: "it hung",
    GRACE_EXIT: "it did not stop within the grace period",
}


def describe_exit(code: int) -> str:
    """Describe the return code of a child process: `SIGKILL`, or `exit 75: it hung`."""
    if code >= 0:
        return f"exit {code}: {DESCRIPTIONS[code]}" if code in DESCRIPTIONS else f"exit {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"
