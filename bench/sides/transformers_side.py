"""transformers' own generate()."""

import time

import torch
import transformers
from serve import serve
from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList


class Clock(StoppingCriteria):
    """transformers calls it after every token."""

    def __init__(self):
        self.started_s = time.perf_counter()
        self.times_s = []

    def __call__(self, input_ids, scores, **_):
        self.times_s.append(time.perf_counter() - self.started_s)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class Transformers:
    def load(self, model, threads, max_sequences, max_tokens, max_step_tokens):
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity_error()
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        return transformers.__version__

    @torch.inference_mode()
    def generate(self, prompts, num_tokens):
        clock, token_ids = Clock(), torch.tensor(prompts)
        found = self._model.generate(
            token_ids,
            attention_mask=torch.ones_like(token_ids),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
        return found[:, token_ids.shape[1] :].tolist(), clock.times_s


if __name__ == "__main__":
    serve(Transformers())
