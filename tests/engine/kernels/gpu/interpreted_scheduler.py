"""Plays the scheduler and its workers (`python -m interpreted_scheduler --config FILE --rank 0`): `--device cuda` is
Triton's interpreter here, and gloo carries what ranks say to one another."""

import os
import time

STARTED = time.monotonic()
os.environ["TRITON_INTERPRET"] = "1"

if __name__ == "__main__":
    import interpreter

    from engine.wire.process import play
    from scheduler_proc.gpus import Gpus
    from scheduler_proc.start import main

    interpreter.hasten()
    play(lambda: main(STARTED, Gpus("cpu", "gloo")))
