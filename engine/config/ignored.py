"""Flags of SGLang beyond `ServerConfig`, so that launch scripts keep working, or fail with a reason."""

from __future__ import annotations

from typing import Literal

Kind = Literal["switch", "int", "float", "str", "ints", "strs", "json"]
"""What a flag takes: nothing, one word of a type, one or more words, one JSON object."""

IGNORED_FLAGS: tuple[tuple[Kind, str], ...] = (
    ("json", "--model-loader-extra-config"),
    ("switch", "--trust-remote-code"),
    ("str", "--model-impl"),
    ("switch", "--delete-ckpt-after-loading"),
    ("int", "--max-lora-rank"),
    ("int", "--max-loras-per-batch"),
    ("int", "--max-loaded-loras"),
    ("str", "--lora-backend"),
    ("str", "--warmups"),
    ("switch", "--enable-http2"),
    ("int", "--tokenizer-worker-num"),
    ("int", "--detokenizer-worker-num"),
    ("str", "--tokenizer-backend"),
    ("switch", "--enable-tokenizer-batch-encode"),
    ("switch", "--enable-dynamic-batch-tokenizer"),
    ("switch", "--disable-tokenizer-batch-decode"),
    ("int", "--batch-notify-size"),
    ("str", "--sampling-defaults"),
    ("switch", "--enable-cache-report"),
    ("str", "--reasoning-parser"),
    ("str", "--tool-call-parser"),
    ("str", "--completion-template"),
    ("switch", "--enable-custom-logit-processor"),
    ("float", "--schedule-conservativeness"),
    ("str", "--radix-eviction-policy"),
    ("switch", "--enable-hierarchical-cache"),
    ("float", "--hicache-ratio"),
    ("int", "--hicache-size"),
    ("str", "--hicache-write-policy"),
    ("str", "--hicache-io-backend"),
    ("str", "--hicache-mem-layout"),
    ("str", "--hicache-storage-backend"),
    ("str", "--hicache-storage-prefetch-policy"),
    ("str", "--hicache-storage-backend-extra-config"),
    ("switch", "--enable-mixed-chunk"),
    ("int", "--num-continuous-decode-steps"),
    ("switch", "--disable-priority-preemption"),
    ("int", "--nccl-port"),
    ("int", "--dist-timeout"),
    ("int", "--gpu-id-step"),
    ("switch", "--enable-dp-attention"),
    ("switch", "--disable-custom-all-reduce"),
    ("ints", "--numa-node"),
    ("str", "--prefill-attention-backend"),
    ("str", "--decode-attention-backend"),
    ("str", "--sampling-backend"),
    ("str", "--moe-runner-backend"),
    ("str", "--moe-a2a-backend"),
    ("switch", "--enable-mis"),
    ("switch", "--enable-torch-compile"),
    ("int", "--torch-compile-max-bs"),
    ("switch", "--enable-strict-thinking"),
    ("int", "--cuda-graph-max-bs-prefill"),
    ("ints", "--cuda-graph-bs-decode"),
    ("str", "--cuda-graph-backend-decode"),
    ("str", "--cuda-graph-backend-prefill"),
    ("switch", "--disable-prefill-cuda-graph"),
    ("switch", "--disable-cuda-graph-padding"),
    ("str", "--cuda-graph-config"),
    ("switch", "--show-time-cost"),
    ("switch", "--enable-request-time-stats-logging"),
    ("str", "--crash-dump-folder"),
    ("switch", "--sleep-on-idle"),
    ("ints", "--gc-threshold"),
    ("switch", "--enable-eplb"),
    ("str", "--expert-balancedness-report-mode"),
)
"""Parsed, checked for their type, and otherwise ignored with a warning."""

WHY_IGNORED = {"--trust-remote-code": "code that comes with a checkpoint is never run"}
"""What the warning says beyond that the flag has no effect."""

NOT_YET_FLAGS: tuple[tuple[Kind, str, str], ...] = (
    ("switch", "--enable-lora", "LoRA adapters"),
    ("strs", "--lora-paths", "LoRA adapters"),
    ("switch", "--enable-return-hidden-states", "returning hidden states"),
    ("str", "--return-hidden-states-mode", "returning hidden states"),
    ("switch", "--enable-streaming-session", "sessions"),
    ("int", "--priority-scheduling-preemption-threshold", "preemption by priority"),
    ("switch", "--enable-memory-saver", "releasing memory"),
    ("str", "--speculative-algorithm", "speculative decoding"),
    ("str", "--speculative-draft-model-path", "speculative decoding"),
    ("int", "--speculative-num-steps", "speculative decoding"),
    ("int", "--speculative-eagle-topk", "speculative decoding"),
    ("int", "--speculative-num-draft-tokens", "speculative decoding"),
)
"""Flags of the contract whose feature is not built: refused with a message, so that nobody believes them on."""

REFUSED_PREFIXES: tuple[tuple[str, str], ...] = (("--speculative-", "speculative decoding"),)
"""Families of flags that are refused whatever follows the prefix."""
