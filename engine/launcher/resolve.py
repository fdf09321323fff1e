"""What is decided before the first process starts: where the model lies, and what the settings left open."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

import msgspec

from engine.checkpoints.locate import locate, locate_tokenizer
from engine.checkpoints.model_config import ModelConfig
from engine.checkpoints.read_config import read_model_config
from engine.checkpoints.task import Task, read_task
from engine.checkpoints.tokenizer import read_chat_template, read_eos_ids
from engine.config import ConfigError, ModelFacts, ModelSource, ServerConfig
from engine.config.checks import SERVED_POLICIES
from engine.config.environment import switch
from engine.config.run import PooledFacts
from engine.config.server import QUEUED_REQUESTS, QUEUED_TOKENS
from engine.kernels.cores import physical_cores
from engine.launcher.device import served_device
from engine.parallel.division import divide

JUDGE = 'answer can only be "yes" or "no"'
"""What the chat template of a decoder that reranks says."""
QUANTISED_DTYPE = "bfloat16"
_DTYPES = {"half": "float16", "float": "float32"}


@dataclass(frozen=True)
class Resolved:
    """A launch: settings in which None means that only the scheduler can decide, the model, and its tokenizer."""

    server: ServerConfig
    model: ModelSource
    tokenizer: ModelSource | None
    facts: ModelFacts
    warnings: list[str]


def resolve(config: ServerConfig) -> Resolved:
    """Find the model (this may download it) and decide what `config` leaves open.

    Neither torch nor transformers is imported. Raises CheckpointError when the model or its tokenizer cannot be found
    or read, ConfigError when a setting does not fit it.
    """
    _check_files(config)
    model = locate(config.model_path, revision=config.revision, download_dir=config.download_dir)
    _check_load_format(config, model)
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = locate_tokenizer(
            config.tokenizer_path, model, revision=config.revision, download_dir=config.download_dir
        )
    model_config = read_model_config(model, config.json_model_override_args)
    divide(model_config, 0, config.tp_size)
    task = read_task(model, model_config, is_embedding=config.is_embedding)
    context_length, warnings = _context_length(config, model_config, task)
    facts = ModelFacts(
        architectures=[model_config.architecture],
        model_type=model_config.model_type,
        vocab_size=model_config.vocab_size,
        context_length=context_length,
        eos_ids=_eos_ids(model_config, tokenizer),
        pooled=_pooled(task, model_config),
        judges=tokenizer is not None and JUDGE in (read_chat_template(tokenizer, config.chat_template) or ""),
    )
    return Resolved(_filled_in(config, model, model_config, context_length), model, tokenizer, facts, warnings)


def _check_files(config: ServerConfig) -> None:
    """Raise ConfigError for a file that is named and not there, before anything is loaded or downloaded."""
    for flag, name in (
        ("--chat-template", config.chat_template),
        ("--ssl-keyfile", config.ssl_keyfile),
        ("--ssl-certfile", config.ssl_certfile),
        ("--ssl-ca-certs", config.ssl_ca_certs),
    ):
        if name is not None and not Path(name).is_file():
            raise ConfigError(f"argument {flag}: {name!r}: there is no such file")
    for folder in config.allowed_weights_root:
        if not Path(folder).is_dir():
            raise ConfigError(f"argument --allowed-weights-root: {folder!r}: there is no such folder")


def _check_load_format(config: ServerConfig, model: ModelSource) -> None:
    held = "gguf" if model.kind == "gguf" else "safetensors"
    if config.load_format not in ("auto", "dummy", held):
        raise ConfigError(
            f"argument --load-format: {config.load_format!r}: {model.path} is read as {held}; "
            f"allowed for it are auto, {held} and dummy"
        )


def _pooled(task: Task, model: ModelConfig) -> PooledFacts | None:
    if task.kind == "generation":
        return None
    return PooledFacts(
        kind=task.kind,
        width=task.width,
        cross_encoder=task.cross_encoder,
        score_activation=task.score_activation,
        dimensions=None if task.dimensions is None else list(task.dimensions),
        segments=0 if model.encoder is None else model.encoder.type_vocab_size,
    )


def _context_length(config: ServerConfig, model: ModelConfig, task: Task) -> tuple[int, list[str]]:
    wanted, limit = config.context_length, model.context_length
    if wanted is None:
        return min(limit, task.max_length or limit), []
    if wanted <= limit:
        return wanted, []
    excess = f"{wanted} is more than the {limit} tokens that the model was made for"
    if not switch("ALLOW_OVERWRITE_LONGER_CONTEXT_LEN"):
        raise ConfigError(
            f"argument --context-length: {excess}; set SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN=1 to serve it all "
            "the same"
        )
    return wanted, [f"--context-length {excess}: answers may be wrong"]


def _eos_ids(model: ModelConfig, tokenizer: ModelSource | None) -> list[int]:
    found = {*model.eos_ids, *(read_eos_ids(tokenizer) if tokenizer is not None else ())}
    return sorted(token for token in found if token < model.vocab_size)


def _filled_in(
    config: ServerConfig, model: ModelSource, model_config: ModelConfig, context_length: int
) -> ServerConfig:
    bundled = config.model_path is None
    device = served_device(config.device, config.tp_size // config.nnodes, config.base_gpu_id)
    return msgspec.structs.replace(
        config,
        model_path=model.name,
        tokenizer_path=config.tokenizer_path or model.name,
        # The bundled model is known by its plain name: SmolLM2-135M-Instruct.Q4_1.gguf is a detail of its packaging.
        served_model_name=config.served_model_name
        or (Path(model.path).name.partition(".")[0] if bundled else model.name),
        context_length=context_length,
        dtype=_dtype(config.dtype, model_config),
        max_queued_requests=config.max_queued_requests or QUEUED_REQUESTS,
        max_queued_tokens=config.max_queued_tokens or QUEUED_TOKENS,
        max_prefill_tokens=max(config.max_prefill_tokens, context_length),
        schedule_policy=config.schedule_policy if config.schedule_policy in SERVED_POLICIES else "fcfs",
        page_size=1,
        device=device,
        attention_backend="triton" if device == "cuda" else "torch_native",
        random_seed=secrets.randbits(31) if config.random_seed is None else config.random_seed,
        cpu_threads=config.cpu_threads or len(physical_cores()),
        log_level_http=config.log_level_http or config.log_level,
    )


def _dtype(flag: str, model: ModelConfig) -> str:
    """The flag's, else the checkpoint's. Rounding to bfloat16 is nothing beside the quantisation of a GGUF file."""
    if flag == "auto":
        return model.dtype or QUANTISED_DTYPE
    return _DTYPES.get(flag, flag)
