"""Find a model, read its configuration, its tokenizer and its weights (Hugging Face folders, GGUF files, the hub)."""
