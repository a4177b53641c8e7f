// logits[m, e] = hidden[m] . router_weight[e], in float32, for M = 1..CAP tokens
// grid (32, E, 1), threadgroup (32, S, 1), S dividing E.
// A simdgroup owns one expert's row and loads it once for all tokens; a lane owns every 32nd run of 8 inputs.
// Template: T, K inputs, E experts, CAP. K % 32 == 0, M <= CAP <= 16.
const uint lane = thread_index_in_simdgroup;
const uint expert = thread_position_in_grid.y;
const int num_tokens = hidden_shape[0];
const device T* row = router_weight + size_t(expert) * K;
float acc[CAP];
UNROLL
for (int t = 0; t < CAP; t++) {
  acc[t] = 0.0f;
}
for (int k = int(lane) * 8; k < K; k += 32 * 8) {
  float weights[8];
  UNROLL
  for (int i = 0; i < 8; i++) {
    weights[i] = float(row[k + i]);
  }
  UNROLL
  for (int t = 0; t < CAP; t++) {
    if (t < num_tokens) {
      UNROLL
      for (int i = 0; i < 8; i++) {
        acc[t] = metal::fma(float(hidden[t * K + k + i]), weights[i], acc[t]);
      }
    }
  }
}
UNROLL
for (int t = 0; t < CAP; t++) {
  if (t < num_tokens) {
    float sum = simd_sum(acc[t]);
    if (lane == 0) {
      logits[t * E + int(expert)] = sum;
    }
  }
}
