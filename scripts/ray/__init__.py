"""Replicas under Ray Serve (docs/scaling.md)."""
