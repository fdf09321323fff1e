"""ServerConfig: every setting of a server, as one frozen struct. The command line is generated from it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from engine.config.flags import Flag, json_object, token_count

MOST_RANKS = 128
QUEUED_REQUESTS = 65536
QUEUED_TOKENS = 8 << 20
"""What may wait where the flags say nothing, so that memory is bounded."""


class ConfigError(ValueError):
    """A setting that cannot be served. The message names the flag, the value and what is allowed."""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of `tokenmill serve`. None means: decided at start (see engine/launcher/resolve.py)."""

    # Model and tokenizer
    model_path: Annotated[
        str | None,
        Flag("folder, .gguf file or hub id; none: the bundled default model", names=("--model-path", "--model")),
    ] = None
    tokenizer_path: Annotated[str | None, Flag("folder, .gguf file or hub id of the tokenizer")] = None
    tokenizer_mode: Annotated[str, Flag("fast tokenizer if there is one, or never", choices=("auto", "slow"))] = "auto"
    skip_tokenizer_init: Annotated[bool, Flag("load no tokenizer: input_ids in, output_ids out")] = False
    load_format: Annotated[
        str, Flag("how weights are stored; dummy: random", choices=("auto", "safetensors", "gguf", "dummy"))
    ] = "auto"
    quantization: Annotated[str | None, Flag("quantisation method; none is supported yet beyond GGUF files")] = None
    context_length: Annotated[
        int | None, Flag("most prompt + output tokens of a request", parse=token_count, metavar="N", minimum=1)
    ] = None
    is_embedding: Annotated[bool, Flag("serve a causal model as an embedding model")] = False
    revision: Annotated[str | None, Flag("hub revision")] = None
    json_model_override_args: Annotated[
        dict[str, Any], Flag("JSON object merged over the model's config.json", parse=json_object, metavar="JSON")
    ] = {}
    dtype: Annotated[
        str,
        Flag(
            "type of weights and activations; auto: the checkpoint's, bfloat16 for quantised GGUF files",
            choices=("auto", "half", "float16", "bfloat16", "float", "float32"),
        ),
    ] = "auto"
    kv_cache_dtype: Annotated[str, Flag("type of the KV pool", choices=("auto", "float16", "bfloat16", "float32"))] = (
        "auto"
    )
    download_dir: Annotated[str | None, Flag("hub cache folder")] = None
    served_model_name: Annotated[str | None, Flag("id in /v1/models; default: the model path")] = None
    weight_version: Annotated[str, Flag("reported as weight_version")] = "default"
    chat_template: Annotated[str | None, Flag("file with a Jinja chat template")] = None

    # HTTP server and API behaviour
    host: Annotated[str, Flag("listening address")] = "127.0.0.1"
    port: Annotated[int, Flag("listening port; 0: any free one", minimum=0, maximum=65535)] = 30000
    fastapi_root_path: Annotated[str, Flag("path prefix when behind a proxy")] = ""
    skip_server_warmup: Annotated[bool, Flag("send no warm-up request at start")] = False
    api_key: Annotated[str | None, Flag("bearer token of all routes but the exempt ones")] = None
    admin_api_key: Annotated[str | None, Flag("bearer token of administrative routes")] = None
    ssl_keyfile: Annotated[str | None, Flag("TLS key")] = None
    ssl_certfile: Annotated[str | None, Flag("TLS certificate")] = None
    ssl_ca_certs: Annotated[str | None, Flag("TLS certificate authorities")] = None
    ssl_cert_reqs: Annotated[
        int,
        Flag(
            "certificates of clients, for which --ssl-ca-certs vouch; 0: not asked for, 1: may be shown, 2: must be",
            minimum=0,
            maximum=2,
        ),
    ] = 0
    ssl_keyfile_password: Annotated[str | None, Flag("password of the TLS key")] = None
    preferred_sampling_params: Annotated[
        dict[str, Any] | None,
        Flag("JSON object of sampling defaults, laid under each request's own", parse=json_object, metavar="JSON"),
    ] = None
    stream_interval: Annotated[int, Flag("send a chunk every N tokens", minimum=1)] = 1
    incremental_streaming_output: Annotated[bool, Flag("streamed text, ids and logprobs are deltas")] = False
    allow_auto_truncate: Annotated[bool, Flag("cut over-long requests instead of refusing them")] = False

    # Limits of what clients may ask for (docs/limits.md)
    max_body_bytes: Annotated[int, Flag("most bytes of a request's body; beyond it 413", minimum=1)] = 64 << 20
    max_open_streams: Annotated[int, Flag("most calls that are being answered; beyond it 503", minimum=1)] = 4096
    request_timeout: Annotated[float | None, Flag("seconds that a request may take that names no timeout")] = None
    stalled_stream_timeout: Annotated[
        float, Flag("seconds that a client may leave its answer unread before it is hung up on")
    ] = 300.0
    request_read_timeout: Annotated[
        float, Flag("seconds that the head of a request may take, and a pause in its body")
    ] = 60.0
    allowed_weights_root: Annotated[
        list[str], Flag("folders from which weights may be updated; none: any", metavar="DIR")
    ] = []

    # Scheduling, memory, cache
    mem_fraction_static: Annotated[
        float | None, Flag("share of the free memory that weights and KV pool may take, in (0, 1)")
    ] = None
    max_running_requests: Annotated[int | None, Flag("most requests that run at once", minimum=1)] = None
    max_queued_requests: Annotated[
        int | None, Flag(f"most requests that wait; beyond it 503; default: {QUEUED_REQUESTS}", minimum=1)
    ] = None
    max_queued_tokens: Annotated[
        int | None,
        Flag(
            f"most prompt tokens that wait; beyond it 503; default: {QUEUED_TOKENS}",
            parse=token_count,
            metavar="N",
            minimum=1,
        ),
    ] = None
    max_total_tokens: Annotated[
        int | None, Flag("KV pool size in tokens", parse=token_count, metavar="N", minimum=1)
    ] = None
    chunked_prefill_size: Annotated[
        int | None,
        Flag(
            "most prompt tokens of a step; -1: no chunking; default: by the kernels",
            parse=token_count,
            metavar="N",
            minimum=-1,
        ),
    ] = None
    max_prefill_tokens: Annotated[
        int, Flag("prompt tokens of a step when prompts are not chunked", parse=token_count, metavar="N", minimum=1)
    ] = 16384
    prefill_max_requests: Annotated[int | None, Flag("most requests that prefill in one step", minimum=1)] = None
    schedule_policy: Annotated[
        str,
        Flag(
            "order of waiting requests: first come first served, or longest cached prefix first",
            choices=(
                "fcfs",
                "lpm",
                "random",
                "dfs-weight",
                "lof",
                "priority",
                "routing-key",
                "hrrn",
                "shortest-prefill-first",
            ),
        ),
    ] = "fcfs"
    page_size: Annotated[int | None, Flag("tokens per KV page; only 1")] = None
    enable_priority_scheduling: Annotated[bool, Flag("order waiting requests by their priority")] = False
    schedule_low_priority_values_first: Annotated[bool, Flag("a smaller priority goes first")] = False
    default_priority_value: Annotated[
        int | None, Flag("priority of requests that name none", minimum=-(2**63), maximum=2**63 - 1)
    ] = None
    abort_on_priority_when_disabled: Annotated[
        bool, Flag("503 for a request with a priority while priorities are off")
    ] = False
    disable_radix_cache: Annotated[bool, Flag("no prefix reuse")] = False

    # Parallelism and devices
    tp_size: Annotated[
        int,
        Flag(
            "tensor-parallel ranks, a process each; at most as many as the model's heads allow",
            names=("--tp-size", "--tensor-parallel-size", "--tp"),
            minimum=1,
            maximum=MOST_RANKS,
        ),
    ] = 1
    nnodes: Annotated[int, Flag("machines that the ranks are on, as many on each", minimum=1, maximum=MOST_RANKS)] = 1
    node_rank: Annotated[
        int, Flag("number of this machine; only machine 0 serves HTTP", minimum=0, maximum=MOST_RANKS - 1)
    ] = 0
    dist_init_addr: Annotated[
        str | None,
        Flag(
            "HOST:PORT of machine 0, where the machines find one another",
            names=("--dist-init-addr", "--nccl-init-addr"),
        ),
    ] = None
    device: Annotated[
        str,
        Flag(
            "where the model runs; auto: on a GPU where there is one, with a torch and triton for it, else on the CPU",
            choices=("auto", "cpu", "cuda"),
        ),
    ] = "auto"
    base_gpu_id: Annotated[
        int, Flag("GPU of a machine's first rank; each further rank has the next one", minimum=0)
    ] = 0
    pp_size: Annotated[int, Flag("pipeline-parallel size; only 1", names=("--pp-size", "--pipeline-parallel-size"))] = 1
    dp_size: Annotated[int, Flag("data-parallel size; only 1", names=("--dp-size", "--data-parallel-size"))] = 1
    ep_size: Annotated[
        int, Flag("expert-parallel size; only 1", names=("--ep-size", "--expert-parallel-size", "--ep"))
    ] = 1
    disaggregation_mode: Annotated[str, Flag("prefill/decode split; only null")] = "null"

    # Kernels and numerics
    attention_backend: Annotated[str | None, Flag("attention kernels: triton, torch_native")] = None
    grammar_backend: Annotated[
        str,
        Flag(
            "engine of constrained output: llguidance, which also serves under the name of the default; none: refused"
        ),
    ] = "xgrammar"
    constrained_json_whitespace_pattern: Annotated[
        str | None, Flag("regular expression of the whitespace that a json_schema allows between tokens of JSON")
    ] = None
    constrained_json_disable_any_whitespace: Annotated[
        bool, Flag("a json_schema allows no whitespace between tokens of JSON")
    ] = False
    random_seed: Annotated[int | None, Flag("seed of the server's own randomness", minimum=0, maximum=2**63 - 1)] = None
    enable_deterministic_inference: Annotated[bool, Flag("accepted: Tokenmill is always deterministic")] = False
    disable_cuda_graph: Annotated[
        bool,
        Flag(
            "on a GPU, launch decodes kernel by kernel; no effect on a CPU",
            names=("--disable-cuda-graph", "--disable-decode-cuda-graph"),
        ),
    ] = False
    cuda_graph_max_bs: Annotated[
        int | None,
        Flag(
            "on a GPU, most sequences of a decode that is a CUDA graph; default: as many as may run, at most 256",
            names=("--cuda-graph-max-bs", "--cuda-graph-max-bs-decode"),
            minimum=1,
        ),
    ] = None
    disable_overlap_schedule: Annotated[
        bool, Flag("on a GPU, plan a step only when the one before has been read; no effect on a CPU")
    ] = False
    cpu_threads: Annotated[
        int | None,
        Flag("threads of the model on a CPU, of all ranks together; default: one a physical core", minimum=1),
    ] = None
    cpu_isa: Annotated[
        str,
        Flag(
            "instruction set of the model's kernels on a CPU; auto: the best there is; reference: plain torch, slow",
            choices=("auto", "amx", "avx512bf16", "avx512", "avx2", "reference"),
        ),
    ] = "auto"

    # Expert distribution
    expert_distribution_recorder_mode: Annotated[
        str | None,
        Flag(
            "record which experts are chosen, on demand: counts in all, of each step, or the choices of each token",
            choices=("stat", "stat_approx", "per_pass", "per_token"),
        ),
    ] = None
    expert_distribution_recorder_buffer_size: Annotated[
        int | None, Flag("steps that the recorder keeps, the last ones; -1: all; default: 1000", minimum=-1)
    ] = None
    expert_distribution_recorder_dir: Annotated[
        str | None,
        Flag("folder of the recorder's files; default: SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR, else /tmp"),
    ] = None

    # Logging and supervision
    log_level: Annotated[
        str, Flag("level of all loggers", choices=("critical", "error", "warning", "info", "debug"))
    ] = "info"
    log_level_http: Annotated[
        str | None,
        Flag("level of the HTTP access log", choices=("critical", "error", "warning", "info", "debug")),
    ] = None
    log_format: Annotated[
        str, Flag("one line of text or one JSON object for each record", choices=("text", "json"))
    ] = "text"
    log_requests: Annotated[bool, Flag("log each request and its answer")] = False
    log_requests_level: Annotated[
        int,
        Flag(
            "what of a request is logged; 0: its numbers, 1: and sampling parameters, 2: and the beginning of its "
            "texts, 3: everything",
            minimum=0,
            maximum=3,
        ),
    ] = 2
    log_requests_format: Annotated[str, Flag("form of the request log's lines", choices=("text", "json"))] = "text"
    log_requests_target: Annotated[
        list[str], Flag("where requests are logged: stdout, or a folder; default: stdout", metavar="TARGET")
    ] = []
    enable_metrics: Annotated[bool, Flag("GET /metrics answers, and meta_info has a request's timings")] = False
    uvicorn_access_log_exclude_prefixes: Annotated[
        list[str], Flag("path prefixes that are not access-logged", metavar="PREFIX")
    ] = []
    decode_log_interval: Annotated[int, Flag("decode steps between throughput log lines", minimum=1)] = 40
    watchdog_timeout: Annotated[
        float, Flag("seconds without a sign of life after which a process counts as hung and is replaced")
    ] = 300.0
    soft_watchdog_timeout: Annotated[
        float | None, Flag("seconds without a sign of life after which a process is only reported")
    ] = None
    max_restarts: Annotated[
        int, Flag("deaths of processes within --restart-window that are survived; beyond it the server ends", minimum=0)
    ] = 5
    restart_window: Annotated[float, Flag("seconds in which deaths are counted")] = 300.0
    drain_timeout: Annotated[float, Flag("seconds that running requests get after SIGTERM", minimum=0)] = 30.0
