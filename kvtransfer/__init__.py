"""Moving KV blocks between workers: plans (pure), tickets, digests, and the transports that carry bytes.

A transport knows regions of memory and pieces of them. It knows no model, no request, no block.
"""
