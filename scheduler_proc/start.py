"""Putting the scheduler process together: configuration, engine, queues, sockets."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import msgspec
import zmq

from engine.checkpoints.errors import CheckpointError
from engine.config import ConfigError, RunConfig
from engine.config.environment import switch, time_limit
from engine.config.run import Served
from engine.kernels.queued import QueueingProgram
from engine.parallel.group import GroupLostError
from engine.wire.board import Heart
from engine.wire.process import arguments, begin, leave, report_ready
from engine.wire.sockets import Inbox, Outbox
from engine.wire.to_scheduler import ToScheduler
from engine.wire.to_worker import RANKS, FromWorker, Loaded, ToWorker, worker_name
from scheduler_proc.answers import Answers
from scheduler_proc.company import ALONE
from scheduler_proc.gpus import GPUS, Gpus
from scheduler_proc.hosts import follow, lines_to_rank_0, served_there
from scheduler_proc.kv_memory import KvMemory
from scheduler_proc.load import LARGEST_CHUNK, Engine, largest_step, load_engine, longest_request
from scheduler_proc.memory import Memory
from scheduler_proc.planner import Planner, PlannerLimits
from scheduler_proc.ranked_program import Bounds, ranked
from scheduler_proc.ranks import open_ranks
from scheduler_proc.record_spool import Spool
from scheduler_proc.recorder import Recorder, recorder_settings
from scheduler_proc.runner import Runner
from scheduler_proc.scheduler import Scheduler
from scheduler_proc.settings import SchedulerSettings
from scheduler_proc.statistics import Statistics
from scheduler_proc.step_memory import StepMemory
from scheduler_proc.weight_updates import WeightUpdates
from scheduler_proc.weights import Weights, WeightsLostError
from scheduler_proc.worker import Line, Worker

logger = logging.getLogger(__name__)

NAME = "scheduler"


def main(started: float, gpus: Gpus = GPUS) -> None:
    """Load the model, then schedule and compute until ended.

    started: time.monotonic() of the process's first line. gpus: what `--device cuda` means.
    """
    options = arguments("Tokenmill's scheduler and model worker", rank=True)
    config = begin(options.config, f"scheduler tp{options.rank}")
    try:
        if options.rank:
            work(config, options.rank, started, gpus)
        else:
            schedule(config, started, gpus)
    except (CheckpointError, ConfigError) as error:
        sys.exit(f"error: {error}")
    except (WeightsLostError, GroupLostError) as error:
        logger.critical("Rank %d ends: %s", options.rank, error)
        leave()  # what carries the group would wait for the ranks that are gone, and so may a thread


def schedule(config: RunConfig, started: float, gpus: Gpus = GPUS) -> None:
    """As rank 0, which may be the only one."""
    server = config.server
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    inbox: Inbox[ToScheduler] = Inbox(context, config.runtime_dir, NAME, ToScheduler)
    heart = Heart(config.runtime_dir, NAME)
    ranks, moved = None, config.model if config.launched else None
    if server.tp_size > 1:
        served = Served(source=moved, weight_version=server.weight_version)
        ranks = open_ranks(context, config, served, heart)
    engine = load_engine(config, started=started, beat=heart.beat, company=ranks or ALONE, gpus=gpus)
    program, loop_settings = engine.program, settings(config, engine, started)
    if ranks is not None:
        ranks.loaded()
        program = ranked(program, ranks, bounds(config, engine))
    weights = Weights(engine.model, engine.checkpoint, config, moved=moved, ranks=ranks)
    overlaps = engine.task.kind == "generation" and not server.disable_overlap_schedule
    queueing = program if isinstance(program, QueueingProgram) and overlaps else None
    divided = ranks is not None and engine.task.kind == "generation" and not isinstance(program, QueueingProgram)
    scheduler = Scheduler(
        settings=loop_settings,
        planner=Planner(planner_limits(config, engine), memory(config, engine)),
        runner=Runner(program, engine.backend, recorder(config, engine), divided),
        backend=engine.backend,
        inbox=inbox,
        outbox=Answers(Outbox(context, config.runtime_dir, "detokenizer")),
        statistics=Statistics(config.server.decode_log_interval),
        updates=WeightUpdates(weights),
        first_version=server.weight_version,
        heart=heart,
        ranks=ranks,
        queueing=queueing,
    )
    scheduler.generation.set_paused(config.standing.paused)
    scheduler.operation.pause = config.standing.step_sleep
    heart.beat()
    report_ready(context, config, NAME, engine.limits)
    scheduler.loop()


def work(config: RunConfig, rank: int, started: float, gpus: Gpus = GPUS) -> None:
    """As a rank that another one, rank 0, tells what to do."""
    name, server = worker_name(rank), config.server
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    heart = Heart(config.runtime_dir, name)
    hosts = None
    if server.nnodes > 1:
        hosts = follow(server, heart.beat)
        heart.also = hosts.look
    inbox: Inbox[ToWorker]
    outbox: Outbox[FromWorker]
    if hosts is not None and server.node_rank:
        inbox, outbox = lines_to_rank_0(hosts, rank, context, heart.beat)
        config = served_there(hosts, config)
    else:
        inbox = Inbox(context, config.runtime_dir, name, ToWorker)
        outbox = Outbox(context, config.runtime_dir, RANKS)
    line = Line(rank, server.tp_size, inbox, outbox, heart.beat, hosts, server.tp_size // server.nnodes)
    engine = load_engine(config, started=started, beat=heart.beat, company=line, gpus=gpus)
    weights = Weights(engine.model, engine.checkpoint, config, beat=heart.beat)
    worker = Worker(line, engine.program, weights, recorder(config, engine, rank))
    outbox.send(Loaded(rank))
    report_ready(context, config, name)
    worker.loop()


def bounds(config: RunConfig, engine: Engine) -> Bounds:
    model, context = engine.model.config, config.facts.context_length
    chunk = max(LARGEST_CHUNK, engine.backend.prefill_chunk)
    return Bounds(
        vocabulary=model.vocab_size,
        slots=engine.limits.max_total_num_tokens,
        tokens=largest_step(config.server, model, engine.task, context, chunk),
        positions=context,
    )


def memory(config: RunConfig, engine: Engine) -> Memory:
    if engine.reads_whole:
        return StepMemory(engine.limits.max_total_num_tokens)
    return KvMemory(engine.limits.max_total_num_tokens, reuse=not config.server.disable_radix_cache)


def recorder(config: RunConfig, engine: Engine, rank: int = 0) -> Recorder | None:
    wanted = recorder_settings(config.server, engine.model.config)
    if wanted is None:
        return None
    folder = Path(config.runtime_dir)
    if rank:  # each rank has a record of its own
        folder /= worker_name(rank)
        folder.mkdir(mode=0o700, exist_ok=True)
    found = Recorder(wanted, spool=Spool(folder, wanted.passes))
    found.resume()
    return found


def planner_limits(config: RunConfig, engine: Engine) -> PlannerLimits:
    server = config.server
    chunk = engine.limits.chunked_prefill_size
    return PlannerLimits(
        prefill_budget=chunk if chunk > 0 else server.max_prefill_tokens,
        chunked=chunk > 0 and not engine.reads_whole,
        max_running=engine.limits.max_running_requests,
        max_prefills=server.prefill_max_requests,
        longest_prefix_first=server.schedule_policy == "lpm",
        priorities=server.enable_priority_scheduling,
        low_first=server.schedule_low_priority_values_first,
        default_priority=server.default_priority_value or 0,
    )


def settings(config: RunConfig, engine: Engine, started: float) -> SchedulerSettings:
    server, limits = config.server, engine.limits
    return SchedulerSettings(
        eos_ids=config.facts.eos_ids,
        longest=longest_request(config.facts.context_length, limits.max_total_num_tokens, engine.task),
        max_input=limits.max_req_input_len,
        max_queued=server.max_queued_requests,
        truncate=server.allow_auto_truncate,
        refuse_priority=server.abort_on_priority_when_disabled and not server.enable_priority_scheduling,
        original_logprobs=switch("RETURN_ORIGINAL_LOGPROB"),
        waiting_timeout=time_limit("REQ_WAITING_TIMEOUT"),
        running_timeout=time_limit("REQ_RUNNING_TIMEOUT"),
        strict=switch("STRICT"),
        report=report(config, engine, started),
        task=engine.task,
        max_queued_tokens=server.max_queued_tokens,
        vocab_size=config.facts.vocab_size,
    )


def report(config: RunConfig, engine: Engine, started: float) -> dict[str, object]:
    """The part of `/server_info`'s internal state that does not change (contract §3.2)."""
    limits = engine.limits
    return {
        "effective_max_running_requests_per_dp": limits.max_running_requests,
        "memory_usage": {
            "weight": round(limits.weight_gb, 3),
            "kvcache": round(limits.kvcache_gb, 3),
            "startup_available": round(limits.available_gb, 3),
            "token_capacity": limits.max_total_num_tokens,
            "graph": {"decode": round(limits.graph_gb, 3)} if limits.graph_sizes else {},
        },
        "world_size": config.server.tp_size,
        "startup_time": round(time.monotonic() - started, 3),
        "load_seconds": msgspec.to_builtins(limits.load_seconds),
        "disaggregation_mode": config.server.disaggregation_mode,
        "decode_cuda_graph_bs": list(limits.graph_sizes),
        "decode_cuda_graph_memory_gb": round(limits.graph_gb, 3),
        "dp_size": 1,
        "attn_dp_size": 1,
    }
