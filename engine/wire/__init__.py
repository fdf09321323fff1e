"""Every message that passes between processes, one file per hop, and the two socket classes.

    frontend ─to_tokenizer─► tokenizer ─to_scheduler─► scheduler ─to_detokenizer─► detokenizer ─to_frontend─► frontend

The ring is the only way of a request and of a control message with an answer, so that order is kept
everywhere: an abort cannot overtake its request, nor a flush the requests before it. Three short cuts
leave the ring: the tokenizer answers the frontend what never reaches the scheduler (a refusal, `/tokenize`),
the frontend asks the detokenizer for `/detokenize`, and the detokenizer tells the scheduler to stop
a request whose stop string it has seen. `lifecycle` is between the launcher and everyone.
"""
