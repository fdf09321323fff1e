"""Starts the processes of a server, watches over them, and ends them."""
