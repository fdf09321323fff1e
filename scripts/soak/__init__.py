"""A soak: mixed traffic for minutes, while random processes are killed, and every answer compared with an oracle's.

python -m scripts.soak [--minutes 20] [--kill-every 20] [--seed N] [--model PATH] [-- FLAGS OF THE SERVER]
"""
