"""`tokenmill doctor`: whether this machine can serve a model, and what to change where it cannot."""
