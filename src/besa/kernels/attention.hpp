// What attention of one query to each sequence is given, by Python and by the step of a whole module.
#include <cstdint>

// As besa.kernels.attention fills it in. Numbers of a head follow each other; all other distances are in numbers.
struct Attention {
    const void *query, *keys, *values;
    const uint8_t* allowed;  // (sequences or one, tokens), or none: which tokens count
    void* out;               // (sequences, heads, width of a value)
    int64_t sequences, heads, shared, tokens;  // shared: heads of keys and values
    int64_t width, value_width;                // numbers of a key, of a value
    int64_t query_sequence, query_head;        // distances
    int64_t key_sequence, key_head, key_token;
    int64_t value_sequence, value_head, value_token;
    int64_t allowed_sequence;
    int64_t share;  // products for which another thread is worth its start
    float scale;
};
