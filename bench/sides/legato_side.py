"""Our engine under our scheduler."""

import time

from serve import serve

from bench.timed_loop import TimedLoop
from engine.engine import EngineOptions
from engine.model_files import open_model
from scheduler.batch import Tokens


class Legato:
    def load(self, model, threads, max_sequences, max_tokens, max_step_tokens):
        options = EngineOptions(dtype="bfloat16", device="cpu", threads=threads)
        self._loop = TimedLoop(
            open_model(model),
            options,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            max_step_tokens=max_step_tokens,
        )
        return "this commit"

    def generate(self, prompts, num_tokens):
        started_s = time.perf_counter()
        token_ids = {self._loop.add(prompt, num_tokens): [] for prompt in prompts}
        times_s = []
        while (step := self._loop.step()) is not None:
            for event in step.events:
                if isinstance(event, Tokens):
                    token_ids[event.sequence_id].extend(drawn.token_id for drawn in event.drawn)
            times_s.append(time.perf_counter() - started_s)
        return list(token_ids.values()), times_s


if __name__ == "__main__":
    serve(Legato())
