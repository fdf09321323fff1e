"""Token ids → text, incrementally; stop strings. One process, `python -m detokenizer_proc --config FILE`."""
