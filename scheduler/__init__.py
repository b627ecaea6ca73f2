"""What to compute next, and where its KV lies. Pure: no torch, grpc, asyncio, clock or logging; time is an argument.

The same code decides in prefill workers, decode workers and the planner's simulator.
"""
