"""What prefill and decode workers have in common: engine, scheduler and transports composed into one running whole."""
