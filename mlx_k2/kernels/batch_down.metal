// decode_down for M = 1..CAP tokens at once: the rows of an expert are loaded once for all its tokens.
// grid (32, S, N / R), threadgroup (32, S, 1).
// A threadgroup owns R rows of every token. Its S simdgroups divide the (token, slot) pairs; of all pairs that name one
// expert, the first one computes for all. Parts are stored in threadgroup memory and summed in the order of slots.
// Template: T, K inputs, N rows, TOPK, R, CAP. K % 32 == 0, N % R == 0, M <= CAP <= 16, TOPK <= 32.
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.z * R;
const uint num_tokens = uint(expert_ids_shape[0]);
const uint num_simdgroups = threads_per_threadgroup.y;
threadgroup float parts[CAP * TOPK * R];
constexpr int GROUPS = K / GROUP;

for (uint pair = simdgroup_index_in_threadgroup; pair < num_tokens * TOPK; pair += num_simdgroups) {
  const uint expert = expert_ids[pair];
  uint slot = TOPK;  // lane t: the first slot of token t that chose this expert
  if (lane < num_tokens) {
    for (int i = TOPK - 1; i >= 0; i--) {
      slot = expert_ids[lane * TOPK + i] == expert ? uint(i) : slot;
    }
  }
  const uint earlier = simd_sum(lane * TOPK + slot < pair && slot < TOPK ? 1u : 0u);
  if (earlier > 0) {
    continue;
  }
  const uint choosers = simd_sum(slot < TOPK ? 1u << lane : 0u);  // bit t: token t chose this expert

  const size_t first = (size_t(expert) * N + row) * GROUPS;
  const device uint4* codes = (const device uint4*)down_packed + first;
  const device T* scales = down_scale + first;
  uint inputs_at[CAP];  // where token t's activations for this expert start, in rows of K
  float acc[CAP][R];
  UNROLL
  for (int t = 0; t < CAP; t++) {
    inputs_at[t] = uint(t) * TOPK + simd_shuffle(slot, ushort(t));
    UNROLL
    for (int r = 0; r < R; r++) {
      acc[t][r] = 0.0f;
    }
  }
  for (int g = int(lane); g < GROUPS; g += 32) {
    uint4 words[R];
    float scale_of[R];
    UNROLL
    for (int r = 0; r < R; r++) {
      words[r] = codes[r * GROUPS + g];
      scale_of[r] = float(scales[r * GROUPS + g]);
    }
    UNROLL
    for (int w = 0; w < 4; w++) {
      float weights[R][8];
      UNROLL
      for (int r = 0; r < R; r++) {
        unpack_word(word_of(words[r], w), scale_of[r], weights[r]);
      }
      UNROLL
      for (int t = 0; t < CAP; t++) {
        if ((choosers >> t) & 1u) {
          const device T* inputs = hidden + inputs_at[t] * K + g * GROUP + w * 8;
          UNROLL
          for (int i = 0; i < 8; i++) {
            float input = float(inputs[i]);
            UNROLL
            for (int r = 0; r < R; r++) {
              acc[t][r] = metal::fma(input, weights[r][i], acc[t][r]);
            }
          }
        }
      }
    }
  }
  UNROLL
  for (int t = 0; t < CAP; t++) {
    if ((choosers >> t) & 1u) {
      UNROLL
      for (int r = 0; r < R; r++) {
        float sum = simd_sum(acc[t][r]);
        if (lane < TOPK && expert_ids[t * TOPK + lane] == expert) {
          parts[(t * TOPK + lane) * R + r] = expert_weights[t * TOPK + lane] * sum;
        }
      }
    }
  }
}
threadgroup_barrier(mem_flags::mem_threadgroup);
for (uint i = thread_index_in_threadgroup; i < num_tokens * R; i += 32 * num_simdgroups) {
  const uint token = i / R;
  const uint r = i % R;
  float total = 0.0f;
  for (int j = 0; j < TOPK; j++) {
    total += parts[(token * TOPK + j) * R + r];
  }
  y[size_t(token) * N + row + r] = T(total);
}
