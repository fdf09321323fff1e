"""`tokenmill serve` with `interpreted_scheduler` in the scheduler's place; flags as for `tokenmill serve`."""

from __future__ import annotations

import dataclasses
import sys

from engine.config.command_line import parse_serve
from engine.launcher.children import PROGRAMS
from engine.launcher.serve import serve

if __name__ == "__main__":
    programs = [
        dataclasses.replace(program, module="interpreted_scheduler") if program.name == "scheduler" else program
        for program in PROGRAMS
    ]
    sys.exit(serve(parse_serve(sys.argv[1:]).config, "as typed", [], programs))
