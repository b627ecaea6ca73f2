"""A decode worker: reserves blocks, takes sequences over, writes the answer."""
