// The best TOPK of E experts for each token, best first, the lower id first among equals.
//   score[e] = sigmoid(logits[m, e]); chosen by score + correction_bias; weight = score, normalised, times scaling
// grid (32, M, 1), threadgroup (32, 1, 1): a simdgroup owns one token, a lane every 32nd expert.
// Template: E experts, TOPK, NORMALIZE.
const uint lane = thread_index_in_simdgroup;
const uint token = thread_position_in_grid.y;
constexpr int OWN = (E + 31) / 32;  // experts a lane owns: lane, lane + 32, ...
float score[OWN];
float biased[OWN];
UNROLL
for (int i = 0; i < OWN; i++) {
  const int expert = int(lane) + 32 * i;
  score[i] = 0.0f;
  biased[i] = -INFINITY;
  if (expert < E) {
    const float logit = logits[size_t(token) * E + expert];
    const float tail = 1.0f / (1.0f + metal::exp(metal::abs(logit)));
    score[i] = logit < 0.0f ? tail : 1.0f - tail;
    biased[i] = score[i] + correction_bias[expert];
  }
}
float my_weight = 0.0f;  // lane s: the score of the s-th best
uint my_id = 0;
float total = 0.0f;
for (uint s = 0; s < uint(TOPK); s++) {
  float best = -INFINITY;
  uint best_id = lane;  // also when every score is NaN: an id is always a valid expert
  float best_score = 0.0f;
  UNROLL
  for (int i = 0; i < OWN; i++) {
    if (biased[i] > best) {
      best = biased[i];
      best_id = lane + 32 * uint(i);
      best_score = score[i];
    }
  }
  const float top = simd_max(best);
  const uint winner = simd_min(best == top ? best_id : uint(E - 1));
  const float winner_score = simd_sum(best == top && best_id == winner ? best_score : 0.0f);
  UNROLL
  for (int i = 0; i < OWN; i++) {
    biased[i] = lane + 32 * uint(i) == winner ? -INFINITY : biased[i];
  }
  total += winner_score;
  if (lane == s) {
    my_id = winner;
    my_weight = winner_score;
  }
}
if (lane < uint(TOPK)) {
  const float divisor = NORMALIZE ? total + 1e-20f : 1.0f;
  ids[token * TOPK + lane] = my_id;
  weights[token * TOPK + lane] = my_weight / divisor * scaling[0];
}
