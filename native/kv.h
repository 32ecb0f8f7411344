// The KV cache of a layer by type; see KVCache in kernels.h.
#pragma once

#include "kernels.h"

namespace octavo {

// Offsets and sizes of a layer's pieces; `data` is null.
KVCache kv_layout(int32_t kv_type, size_t num_kv_heads, size_t head_dim);

}  // namespace octavo
