// decode_gate_up for M = 1..CAP tokens at once: the rows of an expert are loaded once for all its tokens.
// grid (32, N / R, M * TOPK), threadgroup (32, S, 1), S dividing N / R.
// Of all (token, slot) pairs that name one expert, the first one computes for all, and the others return.
// Template: T, K inputs, N rows, TOPK, R, CAP. K % 32 == 0, N % R == 0, M <= CAP <= 16, TOPK <= 32.
const uint lane = thread_index_in_simdgroup;
const uint pair = thread_position_in_grid.z;
const uint row = thread_position_in_grid.y * R;
const uint num_tokens = uint(expert_ids_shape[0]);
const uint expert = expert_ids[pair];

uint slot = TOPK;  // lane t: the first slot of token t that chose this expert
if (lane < num_tokens) {
  for (int i = TOPK - 1; i >= 0; i--) {
    slot = expert_ids[lane * TOPK + i] == expert ? uint(i) : slot;
  }
}
const uint earlier = simd_sum(lane * TOPK + slot < pair && slot < TOPK ? 1u : 0u);
if (earlier > 0) {
  return;
}
const uint choosers = simd_sum(slot < TOPK ? 1u << lane : 0u);  // bit t: token t chose this expert

constexpr int GROUPS = K / GROUP;
const size_t first = (size_t(expert) * N + row) * GROUPS;
const device uint4* gate_codes = (const device uint4*)gate_packed + first;
const device uint4* up_codes = (const device uint4*)up_packed + first;
const device T* gate_scales = gate_scale + first;
const device T* up_scales = up_scale + first;
float gate[CAP][R];
float up[CAP][R];
UNROLL
for (int t = 0; t < CAP; t++) {
  UNROLL
  for (int r = 0; r < R; r++) {
    gate[t][r] = 0.0f;
    up[t][r] = 0.0f;
  }
}
for (int g = int(lane); g < GROUPS; g += 32) {
  uint4 gate_words[R];
  uint4 up_words[R];
  float gate_scale_of[R];
  float up_scale_of[R];
  UNROLL
  for (int r = 0; r < R; r++) {
    gate_words[r] = gate_codes[r * GROUPS + g];
    up_words[r] = up_codes[r * GROUPS + g];
    gate_scale_of[r] = float(gate_scales[r * GROUPS + g]);
    up_scale_of[r] = float(up_scales[r * GROUPS + g]);
  }
  UNROLL
  for (int w = 0; w < 4; w++) {
    float gate_weights[R][8];
    float up_weights[R][8];
    UNROLL
    for (int r = 0; r < R; r++) {
      unpack_word(word_of(gate_words[r], w), gate_scale_of[r], gate_weights[r]);
      unpack_word(word_of(up_words[r], w), up_scale_of[r], up_weights[r]);
    }
    UNROLL
    for (int t = 0; t < CAP; t++) {
      if ((choosers >> t) & 1u) {
        const device T* inputs = x + t * K + g * GROUP + w * 8;
        UNROLL
        for (int i = 0; i < 8; i++) {
          float input = float(inputs[i]);
          UNROLL
          for (int r = 0; r < R; r++) {
            gate[t][r] = metal::fma(input, gate_weights[r][i], gate[t][r]);
            up[t][r] = metal::fma(input, up_weights[r][i], up[t][r]);
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
      float value = swiglu(simd_sum(gate[t][r]), simd_sum(up[t][r]));
      if (lane < TOPK && expert_ids[t * TOPK + lane] == expert) {
        hidden[(size_t(t) * TOPK + lane) * N + row + r] = T(value);
      }
    }
  }
}
