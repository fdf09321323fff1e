"""Between the launcher and the processes it supervises."""

from __future__ import annotations

import msgspec


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler can hold, known once the model is loaded.

    max_total_num_tokens: KV pool size in tokens. max_req_input_len: longest admissible prompt.
    weight_gb, kvcache_gb, available_gb: memory of the weights, of the KV pool, and what was free at start (10^9 bytes).
    load_seconds: from the start of the process until it was ready, by phase. graph_sizes, graph_gb: the numbers of
    sequences whose decodes are CUDA graphs, and the memory of these.
    """

    max_total_num_tokens: int
    max_req_input_len: int
    max_running_requests: int
    chunked_prefill_size: int
    weight_gb: float
    kvcache_gb: float
    available_gb: float
    load_seconds: dict[str, float]
    graph_sizes: tuple[int, ...] = ()
    graph_gb: float = 0.0


class Ready(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Process → launcher: loaded, sockets open. `limits` comes from scheduler rank 0 alone."""

    process: str
    pid: int
    limits: Limits | None = None


class Warm(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Frontend → launcher: the warm-up request has passed; `/health` is 200 from now on."""


class Serving(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Launcher → frontend: all processes of this epoch are ready. The epoch grows with each death."""

    epoch: int
    limits: Limits


class Lost(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Launcher → frontend: `process` has died and is being replaced; `Serving` with this epoch or a later one will say
    that all are there again.

    suspect: key of the request or question that it had in hand when it died (`Board.hold`). certain: whether it has
    died by what it did; it may also have been killed or stopped from outside. computed: keys of the requests that a
    scheduler was computing; None: not known. loaded: it was ready, so that it may have died of a request.
    """

    process: str
    epoch: int
    suspect: int | None = None
    certain: bool = True
    computed: list[int] | None = None
    loaded: bool = True


class GiveUp(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Launcher → frontend: processes die too often. Fail what is in flight with `message`, then exit."""

    message: str


class Drain(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Launcher → frontend: refuse what is new, finish what runs within `timeout` seconds, then exit.

    leave_queue: accept no connection any more, since the next server on this socket will.
    """

    timeout: float
    leave_queue: bool = False


ToLauncher = Ready | Warm
FromLauncher = Serving | Lost | GiveUp | Drain
