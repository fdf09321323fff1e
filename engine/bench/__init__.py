"""`tokenmill bench`: load on a server, figures of what it did, and what they could have been."""
