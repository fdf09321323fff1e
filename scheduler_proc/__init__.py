"""The scheduler process: continuous batching, radix cache, KV pool, model runner, sampling."""
