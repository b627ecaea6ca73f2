"""The decoder on one rank: weights, KV memory, step execution, sampling. It never knows who asked."""
