"""A process that logs exposures until it is killed: python showing.py FOLDER."""

import sys

from tfrec.serving.exposures import ExposureLog, Shown


def main() -> None:
    log = ExposureLog(sys.argv[1], rows=500, seconds=1000)
    ids = [str(number) for number in range(50)]
    for number in range(1_000_000):
        log.record(Shown(str(number), "u", ids, [0.5] * 50, [1.0] * 50, ["new"] * 50, "p", "1", 1))
        if number % 10 == 0:
            log.flush()
        if number == 50:
            print("begun", flush=True)


if __name__ == "__main__":
    main()
