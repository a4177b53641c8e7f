// hidden[m, slot, n] = silu(x[m] . gate[e, n]) * (x[m] . up[e, n]),  e = expert_ids[m, slot]
// grid (32, N / R, M * TOPK), threadgroup (32, S, 1), S dividing N / R.
// A simdgroup owns R rows of gate and the same R of up for one (token, slot); a lane owns every 32nd group of 32
// inputs. No threadgroup memory and no barrier: each weight byte is loaded once, 16 at a time.
// Template: T, K inputs, N rows, TOPK, R. K % 32 == 0, N % R == 0.
const uint lane = thread_index_in_simdgroup;
const uint pair = thread_position_in_grid.z;
const uint row = thread_position_in_grid.y * R;
const size_t expert = expert_ids[pair];
constexpr int GROUPS = K / GROUP;
const size_t first = (expert * N + row) * GROUPS;
const device uint4* gate_codes = (const device uint4*)gate_packed + first;
const device uint4* up_codes = (const device uint4*)up_packed + first;
const device T* gate_scales = gate_scale + first;
const device T* up_scales = up_scale + first;
const device T* inputs = x + (pair / TOPK) * K;
float gate[R];
float up[R];
UNROLL
for (int r = 0; r < R; r++) {
  gate[r] = 0.0f;
  up[r] = 0.0f;
}
float scaled[GROUP];
for (int g = int(lane); g < GROUPS; g += 32) {
  float sum = load_group(inputs + g * GROUP, scaled);
  UNROLL
  for (int r = 0; r < R; r++) {
    gate[r] = add_group(gate_codes[r * GROUPS + g], float(gate_scales[r * GROUPS + g]), scaled, sum, gate[r]);
    up[r] = add_group(up_codes[r * GROUPS + g], float(up_scales[r * GROUPS + g]), scaled, sum, up[r]);
  }
}
UNROLL
for (int r = 0; r < R; r++) {
  float gate_sum = simd_sum(gate[r]);
  float up_sum = simd_sum(up[r]);
  if (lane == 0) {
    hidden[size_t(pair) * N + row + r] = T(swiglu(gate_sum, up_sum));
  }
}
