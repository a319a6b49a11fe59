"""quiet: what native code writes goes nowhere, and standard error is as before afterwards."""

import os
import subprocess
import sys
import threading

from tfrec.terminal import quiet


def test_nothing_comes_through_and_afterwards_everything(capfd):
    with quiet():
        os.write(2, b"noise")
    os.write(2, b"told")
    assert capfd.readouterr().err == "told"


def test_threads_that_overlap(capfd):
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with quiet():
            first_in.set()
            second_in.wait(10)
        first_out.set()

    def second():
        first_in.wait(10)
        with quiet():
            second_in.set()
            first_out.wait(10)
            os.write(2, b"noise")

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    os.write(2, b"told")
    assert capfd.readouterr().err == "told"


def test_without_standard_error():
    code = "from tfrec.terminal import quiet\nwith quiet(): print('ran')"
    done = subprocess.run(
        ["/bin/sh", "-c", '"$0" -c "$1" 2>&-', sys.executable, code], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "ran\n")
