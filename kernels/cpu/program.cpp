// The layers of a rank as one call: a list of operations that was made once (kernels/cpu/program.py), executed on the
// rows of a step. Each is the very function that is called alone elsewhere, so that the results are bit for bit the same.
#include <cstdint>
#include <cstring>

namespace {

enum Kind : int64_t { LINEAR, NORM, GATE, ROPE, ATTENTION, ROWS, COLUMNS };

// Mirrored by program.py. Buffers are numbers; what an operation does not need is 0, and -1 in the place of a buffer.
struct Operation {
    int64_t kind;
    void *function;
    int64_t in, residual, out;
    const void *weight, *second;      // LINEAR: panels, bias; NORM: weight; ROPE: norms of queries and keys; ATTENTION: sinks;
                                      // COLUMNS: their order
    void *keys, *values;              // ROPE, ATTENTION: of the layer, at the strides below
    const float *cos, *sin;           // ROPE
    int64_t num_outputs, depth;       // LINEAR; NORM, GATE: depth is the row's size, num_outputs the activation; ROWS: bytes;
                                      // COLUMNS: depth of the row that is read, num_outputs of the one written
    int64_t num_heads, num_kv_heads, key_dim, value_dim, rotary_offset, rotary_dim;
    int64_t block_tokens, block_stride, head_stride, token_stride, window;
    float eps, offset, scale, softcap;
};

struct Step {
    int64_t num_rows, num_sequences, table_stride, num_wanted;
    const int64_t *positions, *slots, *wanted;  // wanted: null for all rows, in order
    const int32_t *block_tables, *query_starts, *context_lens;
};

using Linear = void (*)(const void *, const void *, const void *, void *, int64_t, int64_t, int64_t, int);
using Norm = void (*)(const void *, const void *, const void *, void *, void *, int64_t, int64_t, float, float, int);
using Gate = void (*)(const void *, void *, int64_t, int64_t, int, int);
using Rope = void (*)(const void *, const float *, const float *, const int64_t *, const int64_t *, const void *, const void *,
                      void *, void *, void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                      int64_t, float, float, int);
using Attend = void (*)(const void *, const void *, const void *, const int32_t *, const int32_t *, const int32_t *,
                        const void *, void *, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t,
                        int64_t, int64_t, float, float, int);
using Columns = void (*)(const void *, const void *, void *, int64_t, int64_t, int64_t, int);

void take_rows(const char *from, char *to, int64_t row_bytes, const Step &step) {
    if (!step.wanted) {
        memcpy(to, from, step.num_wanted * row_bytes);
        return;
    }
    for (int64_t i = 0; i < step.num_wanted; ++i) memcpy(to + i * row_bytes, from + step.wanted[i] * row_bytes, row_bytes);
}

}  // namespace

extern "C" {

int64_t legato_operation_bytes() { return sizeof(Operation); }

// Rows are the step's, and from the first ROWS on those that are wanted. buffers[i]: memory of buffer i, for all rows.
void legato_run_program(const Operation *operations, int64_t count, void *const *buffers, const Step *step, int threads) {
    int64_t rows = step->num_rows;
    for (const Operation *o = operations; o < operations + count; ++o) {
        void *in = buffers[o->in], *out = buffers[o->out];
        switch (o->kind) {
            case LINEAR:
                ((Linear)o->function)(in, o->weight, o->second, out, rows, o->num_outputs, o->depth, threads);
                break;
            case NORM: {  // the stream is the residual, and stays where it is
                void *stream = o->residual < 0 ? nullptr : buffers[o->residual];
                ((Norm)o->function)(in, o->weight, stream, out, stream, rows, o->depth, o->eps, o->offset, threads);
                break;
            }
            case GATE:
                ((Gate)o->function)(in, out, rows, o->depth, (int)o->num_outputs, threads);
                break;
            case ROPE:
                ((Rope)o->function)(in, o->cos, o->sin, step->positions, step->slots, o->weight, o->second, o->keys, o->values,
                                    out, rows, o->num_heads, o->num_kv_heads, o->key_dim, o->rotary_offset, o->rotary_dim,
                                    o->block_tokens, o->block_stride, o->head_stride, o->token_stride, o->eps, o->offset,
                                    threads);
                break;
            case ATTENTION:
                ((Attend)o->function)(in, o->keys, o->values, step->block_tables, step->query_starts, step->context_lens,
                                      o->weight, out, step->num_sequences, o->num_heads, o->num_kv_heads, o->key_dim,
                                      o->value_dim, o->block_tokens, step->table_stride, o->block_stride, o->head_stride,
                                      o->token_stride, o->window, o->scale, o->softcap, threads);
                break;
            case COLUMNS:
                ((Columns)o->function)(in, o->weight, out, rows, o->num_outputs, o->depth, threads);
                break;
            case ROWS:
                take_rows((const char *)in, (char *)out, o->depth, *step);
                rows = step->num_wanted;  // another ROWS may follow: it reads all rows whatever `rows` is
                break;
        }
    }
}

}  // extern "C"
