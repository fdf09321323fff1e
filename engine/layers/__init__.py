"""What model families share: rotary frequencies, and the parts of a decoder with their weights."""
