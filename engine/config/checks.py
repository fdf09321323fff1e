"""Which settings can be served: ranges, settings that exclude each other, and what is not built yet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

from engine.config.fields import ConfigField, config_fields
from engine.config.server import ConfigError, ServerConfig

SERVED_POLICIES = ("fcfs", "lpm")
SERVED_ATTENTION_BACKENDS = ("triton", "torch_native")
OTHER_ATTENTION_BACKENDS = (
    "aiter", "ascend", "cutlass_mla", "dual_chunk_flash_attn", "fa3", "fa4", "flashinfer", "flashmla", "flex_attention",
    "intel_amx", "intel_xpu", "nsa", "trtllm_mha", "trtllm_mla", "wave",
)  # fmt: skip
SERVED_GRAMMAR_BACKENDS = ("xgrammar", "llguidance", "none")
OTHER_GRAMMAR_BACKENDS = ("outlines",)

_ONLY: tuple[tuple[str, Any, str], ...] = (
    ("page_size", (None, 1), "pages of more than one token are not supported; only 1 is"),
    ("pp_size", (1,), "pipeline parallelism is not supported; only 1 is"),
    ("dp_size", (1,), "data parallelism inside a server is not supported; only 1 is"),
    ("ep_size", (1,), "expert parallelism is not supported; only 1 is"),
    ("disaggregation_mode", ("null",), "splitting prefill from decode is not supported; only null is"),
    ("quantization", (None,), "no method is supported; GGUF files carry their own"),
)  # fmt: skip
"""Field, the values that can be served, and what to say of any other."""

_TLS_NEEDS_CERTIFICATE = ("ssl_keyfile", "ssl_ca_certs", "ssl_keyfile_password")
_POSITIVE_SECONDS = (
    "request_timeout", "stalled_stream_timeout", "request_read_timeout", "watchdog_timeout", "soft_watchdog_timeout",
    "restart_window",
)  # fmt: skip
_NOT_EMPTY = (
    "model_path",
    "tokenizer_path",
    "host",
    "api_key",
    "admin_api_key",
    "served_model_name",
    "expert_distribution_recorder_dir",
)


def check_config(config: ServerConfig) -> list[str]:
    """Check the settings as far as that is possible without looking at the model.

    Returns warnings, one for each setting that has no effect. Raises ConfigError, which names the flag, the value and
    what is allowed.
    """
    fields = {field.name: field for field in config_fields()}
    for check in (_check_words, _check_numbers, _check_patterns, _check_built, _check_names, _check_tls, _check_nodes):
        check(config, fields)
    return list(_without_effect(config))


def _refuse(field: ConfigField, value: Any, reason: str) -> ConfigError:
    return ConfigError(f"argument {field.flag}: {value!r}: {reason}")


def _check_words(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    for field in fields.values():
        value = getattr(config, field.name)
        if field.options.choices is not None and value is not None and value not in field.options.choices:
            raise _refuse(field, value, f"allowed are {', '.join(field.options.choices)}")
    _check_backend(
        fields["attention_backend"],
        config.attention_backend,
        (*SERVED_ATTENTION_BACKENDS, *OTHER_ATTENTION_BACKENDS),
    )
    _check_backend(
        fields["grammar_backend"], config.grammar_backend, (*SERVED_GRAMMAR_BACKENDS, *OTHER_GRAMMAR_BACKENDS)
    )


def _check_backend(field: ConfigField, value: str | None, known: tuple[str, ...]) -> None:
    if value is not None and value not in known:
        raise _refuse(field, value, f"no such backend; known are {', '.join(known)}")


def _check_numbers(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    for field in fields.values():
        value, low, high = getattr(config, field.name), field.options.minimum, field.options.maximum
        if value is None or (low is None and high is None):
            continue
        if not (low is None or value >= low) or not (high is None or value <= high):
            raise _refuse(field, value, f"must be {_range(low, high)}")
    share = config.mem_fraction_static
    if share is not None and not 0.0 < share < 1.0:
        raise _refuse(fields["mem_fraction_static"], share, "must be greater than 0 and less than 1")
    if config.chunked_prefill_size == 0:
        raise _refuse(fields["chunked_prefill_size"], 0, "must be at least 1, or -1 for no chunking")
    if config.expert_distribution_recorder_buffer_size == 0:
        raise _refuse(fields["expert_distribution_recorder_buffer_size"], 0, "must be at least 1, or -1 for no limit")
    for name in _POSITIVE_SECONDS:
        seconds = getattr(config, name)
        if seconds is not None and not 0.0 < seconds < float("inf"):
            raise _refuse(fields[name], seconds, "must be greater than 0 and finite")
    if "" in config.log_requests_target:
        raise _refuse(fields["log_requests_target"], "", "must be stdout or a folder")
    if config.drain_timeout == float("inf"):
        raise _refuse(fields["drain_timeout"], config.drain_timeout, "must be finite")


def _range(low: int | None, high: int | None) -> str:
    if high is None:
        return f"at least {low}"
    return f"at most {high}" if low is None else f"from {low} to {high}"


def _check_patterns(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    pattern = config.constrained_json_whitespace_pattern
    if pattern is None:
        return
    try:
        re.compile(pattern)
    except re.error as error:
        raise _refuse(
            fields["constrained_json_whitespace_pattern"], pattern, f"must be a regular expression: {error}"
        ) from None


def _check_built(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    for name, allowed, reason in _ONLY:
        value = getattr(config, name)
        if value not in allowed:
            raise _refuse(fields[name], value, reason)


def _check_names(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    for name in _NOT_EMPTY:
        if getattr(config, name) == "":
            raise _refuse(fields[name], "", "must not be empty")
    if ":" in (config.served_model_name or ""):
        raise _refuse(fields["served_model_name"], config.served_model_name, "must not contain a colon")
    if config.fastapi_root_path and not config.fastapi_root_path.startswith("/"):
        raise _refuse(fields["fastapi_root_path"], config.fastapi_root_path, "must begin with a slash")


def _check_tls(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    if config.ssl_cert_reqs and config.ssl_ca_certs is None:
        raise _refuse(fields["ssl_cert_reqs"], config.ssl_cert_reqs, "needs --ssl-ca-certs beside it")
    if config.ssl_certfile is not None:
        if config.ssl_keyfile is None:
            raise _refuse(fields["ssl_certfile"], config.ssl_certfile, "needs --ssl-keyfile beside it")
        return
    for name in _TLS_NEEDS_CERTIFICATE:
        if getattr(config, name) is not None:
            raise _refuse(fields[name], "..." if "password" in name else getattr(config, name), "needs --ssl-certfile")


def _check_nodes(config: ServerConfig, fields: dict[str, ConfigField]) -> None:
    if config.node_rank >= config.nnodes:
        raise _refuse(fields["node_rank"], config.node_rank, f"of {config.nnodes} machines, 0 to {config.nnodes - 1}")
    if config.nnodes == 1:
        return
    if config.tp_size % config.nnodes:
        raise _refuse(
            fields["nnodes"], config.nnodes, f"--tp-size is {config.tp_size}, and each machine has as many ranks"
        )
    host, _, port = (config.dist_init_addr or "").rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise _refuse(fields["dist_init_addr"], config.dist_init_addr, "several machines need HOST:PORT of machine 0")


def _without_effect(config: ServerConfig) -> Iterator[str]:
    """What is accepted for the sake of launch scripts though it changes nothing."""
    rules: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
        (
            "--schedule-policy", config.schedule_policy, lambda value: value not in SERVED_POLICIES,
            "requests are taken first come first served (fcfs and lpm are served)",
        ),
        (
            "--attention-backend", config.attention_backend, lambda value: value in OTHER_ATTENTION_BACKENDS,
            "attention runs on Tokenmill's own kernels",
        ),
        (
            "--attention-backend", config.attention_backend,
            lambda value: value == "triton" and config.device == "cpu",
            "its kernels need a GPU; attention runs on the kernels that --cpu-isa chooses",
        ),
        (
            "--grammar-backend", config.grammar_backend, lambda value: value in OTHER_GRAMMAR_BACKENDS,
            "constrained output runs on llguidance",
        ),
        (
            "--dist-init-addr", config.dist_init_addr, lambda value: value is not None and config.nnodes == 1,
            "one machine needs no rendezvous",
        ),
        (
            "--base-gpu-id", config.base_gpu_id, lambda value: value > 0 and config.device == "cpu",
            "the model runs on the CPU",
        ),
    )  # fmt: skip
    for flag, value, without_effect, reason in rules:
        if without_effect(value):
            yield f"{flag} {value} has no effect: {reason}"
