// llama_logits MODEL.gguf TEXT TOKENS.bin LOGITS.bin: prints the ids of the text in the file TEXT, and writes the logits behind each
// of the int32 TOKENS, teacher-forced in one sequence, as float32 rows.
#include <cstdio>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "llama.h"

template <class T>
static std::vector<T> read_all(const char * path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    const T * first = reinterpret_cast<const T *>(bytes.data());
    return std::vector<T>(first, first + bytes.size() / sizeof(T));
}

int main(int, char ** argv) {
    llama_log_set([](ggml_log_level level, const char * text, void *) { if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr); }, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const std::vector<char> text = read_all<char>(argv[2]);
    std::vector<llama_token> ids(text.size() + 8);
    const int count = llama_tokenize(vocab, text.data(), (int) text.size(), ids.data(), (int) ids.size(), true, true);
    for (int i = 0; i < count; ++i) printf("%d ", ids[i]);
    printf("\n");

    std::vector<llama_token> tokens = read_all<llama_token>(argv[3]);
    llama_context_params params = llama_context_default_params();
    params.n_ctx = params.n_batch = params.n_ubatch = (uint32_t) tokens.size();
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.n_threads = params.n_threads_batch = 1;
    params.type_k = params.type_v = GGML_TYPE_F32;  // what is compared is the model, not the precision of the cache or of flash attention
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 1;
    llama_batch batch = llama_batch_init((int) tokens.size(), 0, 1);
    for (size_t i = 0; i < tokens.size(); ++i) {
        batch.token[i] = tokens[i];
        batch.pos[i] = (llama_pos) i;
        batch.n_seq_id[i] = 1;
        batch.seq_id[i][0] = 0;
        batch.logits[i] = true;
    }
    batch.n_tokens = (int) tokens.size();
    if (llama_decode(context, batch) != 0) return 1;
    std::ofstream out(argv[4], std::ios::binary);
    for (size_t i = 0; i < tokens.size(); ++i) {
        out.write(reinterpret_cast<const char *>(llama_get_logits_ith(context, (int) i)), sizeof(float) * llama_vocab_n_tokens(vocab));
    }
    return out.good() ? 0 : 1;
}
