"""A prefill worker: reads the prompt, draws the first token, sends the KV blocks while it computes."""
