"""`python -m scheduler_proc --config FILE --rank 0`: load the model, then schedule and compute until ended."""

import os
import time

STARTED = time.monotonic()

# Torch's threads meet at a barrier after every op. With the default they spin there for milliseconds, which takes the
# core from the very thread they wait for whenever another process wants one: steps became 5 to 20 times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if __name__ == "__main__":
    from engine.wire.process import play
    from scheduler_proc.start import main

    play(lambda: main(STARTED))
