"""vLLM's engine in this process (VLLM_ENABLE_V1_MULTIPROCESSING=0): there is no second one that could poll."""

import time

import vllm
from serve import serve
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt


class Vllm:
    def load(self, model, threads, max_sequences, max_tokens, max_step_tokens):
        self._engine = LLM(
            model=model,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_num_seqs=max_sequences,
            max_num_batched_tokens=max_step_tokens,
            max_model_len=max_tokens,
            disable_log_stats=True,
        ).llm_engine
        return vllm.__version__

    def generate(self, prompts, num_tokens):
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
        started_s = time.perf_counter()
        for number, prompt in enumerate(prompts):
            self._engine.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), params)
        token_ids, times_s = [[] for _ in prompts], []
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            if outputs:
                times_s.append(time.perf_counter() - started_s)
            for output in outputs:
                token_ids[int(output.request_id)] = list(output.outputs[0].token_ids)
        return token_ids, times_s


if __name__ == "__main__":
    serve(Vllm())
