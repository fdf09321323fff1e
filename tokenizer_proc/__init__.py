"""Text → token ids, chat templates, request validation. One process, `python -m tokenizer_proc --config FILE`."""
