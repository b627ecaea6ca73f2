"""llama.cpp through the C interface that llama-cpp-python binds, without that package's own Python loop."""

import ctypes
import time

import llama_cpp
import numpy as np
from serve import serve


class LlamaCpp:
    def load(self, model, threads, max_sequences, max_tokens, max_step_tokens):
        llama_cpp.llama_backend_init()
        loaded = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max_sequences * -(-max_tokens // 256) * 256
        params.n_batch = max_step_tokens
        params.n_seq_max = max_sequences
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(loaded, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp made no context for {model}; its own words are in this side's log")
        self._batch = llama_cpp.llama_batch_init(max_step_tokens, 0, 1)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
        return f"{llama_cpp.__version__} ({llama_cpp.llama_print_system_info().decode().strip()})"

    def generate(self, prompts, num_tokens):
        started_s = time.perf_counter()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        token_ids, times_s = [[] for _ in prompts], []
        pieces, start = prompts, 0
        for _ in range(num_tokens):
            drawn = self._step(pieces, start)
            times_s.append(time.perf_counter() - started_s)
            for answer, token_id in zip(token_ids, drawn, strict=True):
                answer.append(token_id)
            start += len(pieces[0])
            pieces = [[token_id] for token_id in drawn]
        return token_ids, times_s

    def _step(self, pieces, start):
        """Each sequence's next tokens, all from position `start` on. Returns the likeliest token after each."""
        row, last_rows = 0, []
        for sequence, piece in enumerate(pieces):
            for offset, token_id in enumerate(piece):
                self._batch.token[row] = token_id
                self._batch.pos[row] = start + offset
                self._batch.n_seq_id[row] = 1
                self._batch.seq_id[row][0] = sequence
                self._batch.logits[row] = offset == len(piece) - 1
                row += 1
            last_rows.append(row - 1)
        self._batch.n_tokens = row
        status = llama_cpp.llama_decode(self._context, self._batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")
        return [int(self._logits(last).argmax()) for last in last_rows]

    def _logits(self, row):
        address = llama_cpp.llama_get_logits_ith(self._context, row)
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))


if __name__ == "__main__":
    serve(LlamaCpp())
