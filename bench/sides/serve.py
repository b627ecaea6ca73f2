"""What one side of bench.peers is: a process that reads one JSON request a line and writes one JSON answer a line.

    {"verb": "load", "model": path, "threads": n, "max_sequences": n, "max_tokens": n, "max_step_tokens": n}
        -> {"version": "..."}
    {"verb": "generate", "prompts": [[token id, ...], ...], "num_tokens": n}
        -> {"token_ids": [[n of them], ...], "times_s": [n of them]}

`times_s[i]` is when token i of every prompt was there, since the request was read: greedy, the end-of-text token
ignored, all prompts in one batch. Whoever waits for a request sleeps. Standard library only: each side has an
interpreter of its own.
"""

import json
import os
import sys
import traceback


def serve(side):
    """side.load(...) -> version; side.generate(prompts, num_tokens) -> (token_ids, times_s). Ends with the input."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        request = json.loads(line)
        verb = request.pop("verb")
        try:
            if verb == "load":
                answer = {"version": side.load(**request)}
            else:
                token_ids, times_s = side.generate(**request)
                answer = {"token_ids": token_ids, "times_s": times_s}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
