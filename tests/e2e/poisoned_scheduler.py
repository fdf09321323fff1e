"""Plays the scheduler (`python -m poisoned_scheduler --config FILE --rank 0`), and dies of POISON in a step."""

import os
import signal
import time

POISON = 13


def main(started: float) -> None:
    from scheduler_proc import start
    from scheduler_proc.runner import Runner

    run = Runner.run

    def deadly(self, plan):  # type: ignore[no-untyped-def]
        if any(POISON in step.request.tokens[: step.request.length] for step in plan):
            os.kill(os.getpid(), signal.SIGSEGV)
            time.sleep(60)
        return run(self, plan)

    Runner.run = deadly  # type: ignore[method-assign]
    start.main(started)


if __name__ == "__main__":
    main(time.monotonic())
