// INT4 arithmetic that the decode and batch kernels share. A weight is scale * (q - 8): eight 4-bit codes q a word, low
// bits first, one scale for a group of 32 inputs. It also compiles as CUDA after cuda.h, because it has no pointer to
// threadgroup memory.
#ifndef UNROLL
#define UNROLL _Pragma("clang loop unroll(full)")
#endif

constant constexpr int GROUP = 32;

// The 32 inputs of one group, prepared once for all weight rows that are multiplied by them. Input j of four is divided
// by 16^j, so that a code is used at its place in its half-word: a mask and no shift. Returns the sum of the inputs.
template <typename Inputs>
METAL_FUNC float load_group(Inputs x, thread float* scaled) {
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < GROUP; i += 4) {
    float a = float(x[i]), b = float(x[i + 1]), c = float(x[i + 2]), d = float(x[i + 3]);
    sum += (a + b) + (c + d);
    scaled[i] = a;
    scaled[i + 1] = b * (1.0f / 16.0f);
    scaled[i + 2] = c * (1.0f / 256.0f);
    scaled[i + 3] = d * (1.0f / 4096.0f);
  }
  return sum;
}

// acc + the products of a word's eight codes with eight prepared inputs.
METAL_FUNC float add_word(uint word, const thread float* scaled, float acc) {
  uint low = word & 0xffffu;
  uint high = word >> 16;
  acc = metal::fma(scaled[0], float(low & 0x000fu), acc);
  acc = metal::fma(scaled[1], float(low & 0x00f0u), acc);
  acc = metal::fma(scaled[2], float(low & 0x0f00u), acc);
  acc = metal::fma(scaled[3], float(low & 0xf000u), acc);
  acc = metal::fma(scaled[4], float(high & 0x000fu), acc);
  acc = metal::fma(scaled[5], float(high & 0x00f0u), acc);
  acc = metal::fma(scaled[6], float(high & 0x0f00u), acc);
  acc = metal::fma(scaled[7], float(high & 0xf000u), acc);
  return acc;
}

// acc + one group of one row: 16 bytes of codes in one load, and one scale. The offset of 8 costs one product a group.
METAL_FUNC float add_group(uint4 codes, float scale, const thread float* scaled, float sum, float acc) {
  float first = add_word(codes.y, scaled + 8, add_word(codes.x, scaled, -8.0f * sum));
  float second = add_word(codes.w, scaled + 24, add_word(codes.z, scaled + 16, 0.0f));
  return metal::fma(scale, first + second, acc);
}

// Word w of a group's four; w is a constant once the loop over it is unrolled.
METAL_FUNC uint word_of(uint4 codes, int w) {
  return w == 0 ? codes.x : w == 1 ? codes.y : w == 2 ? codes.z : codes.w;
}

// The eight weights of one word, for use with several tokens' inputs.
METAL_FUNC void unpack_word(uint word, float scale, thread float* weights) {
  uint low = word & 0xffffu;
  uint high = word >> 16;
  float offset = -8.0f * scale;
  float scale1 = scale * (1.0f / 16.0f), scale2 = scale * (1.0f / 256.0f), scale3 = scale * (1.0f / 4096.0f);
  weights[0] = metal::fma(float(low & 0x000fu), scale, offset);
  weights[1] = metal::fma(float(low & 0x00f0u), scale1, offset);
  weights[2] = metal::fma(float(low & 0x0f00u), scale2, offset);
  weights[3] = metal::fma(float(low & 0xf000u), scale3, offset);
  weights[4] = metal::fma(float(high & 0x000fu), scale, offset);
  weights[5] = metal::fma(float(high & 0x00f0u), scale1, offset);
  weights[6] = metal::fma(float(high & 0x0f00u), scale2, offset);
  weights[7] = metal::fma(float(high & 0xf000u), scale3, offset);
}

METAL_FUNC float swiglu(float gate, float up) {
  return gate / (1.0f + metal::exp(-gate)) * up;
}
