"""A process that appends until it is killed: python appending.py WHERE PREFIX THREADS.

Prints the number of the thread and of the event of each acknowledged one, after it was
acknowledged.
"""

import os
import sys
import threading

from tfrec.serving.state import Event, State, open_state


def append(state: State, prefix: str, thread: int) -> None:
    for number in range(1_000_000):
        event_id = f"{prefix}-{thread}-{number}"
        assert state.append([Event(event_id, f"u{thread}", str(number), "like", 1.0)]) == [True]
        os.write(1, f"{event_id}\n".encode())


def main() -> None:
    where, prefix, threads = sys.argv[1:]
    state = open_state(where)
    for thread in range(int(threads)):
        threading.Thread(target=append, args=(state, prefix, thread)).start()


if __name__ == "__main__":
    main()
