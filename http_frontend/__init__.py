"""The HTTP frontend: owns every request from its first byte until its last, and speaks the native API.

__main__ ── server ── app ── generate, encode, rerank, score, info, control, text, health     (routes)
                               │
       bodies, diagnosis, defaults, items (a body becomes ring messages)
                               │
       call, whole_call (a client waits for its entries)
                               │
               journal (what is in flight) ── ring (sockets)
                               │
                 answers, logprobs (what a client reads)
"""
