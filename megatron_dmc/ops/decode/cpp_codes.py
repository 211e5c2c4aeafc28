"""The C++ of the cache on a CPU: kept slots as codes, as codes.py has them. See cpp_source.py."""

CODES = r"""
// Slots as codes.

enum Code { AS_IT_IS, INT8, INT4, FP8 };  // as in cpp.py
constexpr float LARGEST = 8.507059173023462e37f;    // 2**126
constexpr float LEAST_STEP = 1.1754943508222875e-38f;  // 2**-126

// A key's blocks times the Hadamard matrix of their size: its own inverse.
void turn_blocks(float* x, int64_t d) {
  const int64_t size = d & -d;
  for (int64_t h = 1; h < size; h *= 2)
    for (int64_t first = 0; first < d; first += 2 * h)
      for (int64_t i = first; i < first + h; ++i) {
        const float a = x[i], b = x[i + h];
        x[i] = a + b;
        x[i + h] = a - b;
      }
  const float scale = 1 / std::sqrt(float(size));
  for (int64_t i = 0; i < d; ++i) x[i] *= scale;
}

// The next number of 8 digits, away from zero where the sign says so.
inline float rounded(float x, bool outwards_if_negative) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const bool negative = bits >> 31, exact = !(bits & 0xffff);
  bits &= 0xffff0000;
  if (!exact && negative == outwards_if_negative) bits += 0x10000;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void put_bf16(float x, uint8_t* to) {
  bfloat16 y;
  narrow(x, &y);  // which it is already
  std::memcpy(to, &y, 2);
}

inline uint8_t to_fp8(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (x != x) return 0x7f | sign;
  x = std::min(std::abs(x), 448.0f);
  if (x < 0.015625f) return sign | uint8_t(std::nearbyint(x * 512));  // steps of 2**-9
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits += 0x7ffff + ((bits >> 20) & 1);
  return sign | uint8_t((bits >> 20) - (120 << 3));
}

inline float from_fp8(uint8_t code) {
  const uint32_t bits = uint32_t(code & 0x80) << 24 | uint32_t(code & 0x7f) << 20;
  float x;
  std::memcpy(&x, &bits, 4);
  return x * 1.329227995784916e36f;  // 2**120
}

void encode(const Step& s, const float* key, const float* value, uint8_t* to) {
  const int64_t d = s.head_dim, size = s.code_group, groups = 2 * d / (size ? size : 2 * d);
  float x[2 * MOST];
  std::copy_n(key, d, x);
  std::copy_n(value, d, x + d);
  if (s.clears_last) x[d - 1] = 0;
  if (s.code == FP8) {
    for (int64_t i = 0; i < 2 * d; ++i) to[i] = to_fp8(x[i]);
    return;
  }
  for (int64_t i = 0; i < 2 * d; ++i) x[i] = std::min(std::max(x[i], -LARGEST), LARGEST);
  turn_blocks(x, d);
  const float most = s.code == INT4 ? 15 : 255;
  uint8_t codes[2 * MOST];
  uint8_t* parts = to + (s.code == INT4 ? d : 2 * d);
  for (int64_t g = 0; g < groups; ++g) {
    const float* from = x + g * size;
    float least = from[0], largest = from[0];
    bool known = true;
    for (int64_t i = 0; i < size; ++i) {
      least = std::min(least, from[i]), largest = std::max(largest, from[i]);
      known &= from[i] == from[i];
    }
    const float offset = rounded(least, true);
    const float step = std::max(rounded((largest - offset) / most, false), LEAST_STEP);
    for (int64_t i = 0; i < size; ++i) {
      const float code = std::nearbyint((from[i] - offset) / step);
      codes[g * size + i] = uint8_t(known ? std::min(std::max(code, 0.0f), most) : 0.0f);
    }
    put_bf16(known ? offset : NAN, parts + 2 * g);
    put_bf16(step, parts + 2 * (groups + g));
  }
  if (s.code == INT8) {
    std::copy_n(codes, 2 * d, to);
    return;
  }
  const int64_t half = d / 2;
  for (int64_t part = 0; part < 2; ++part)
    for (int64_t i = 0; i < half; ++i) to[part * half + i] = codes[part * d + i] | codes[part * d + half + i] << 4;
}

// What codes give back, but for the key's turn: a query is turned in its place.
void decode(const Step& s, const uint8_t* from, float* both) {
  const int64_t d = s.head_dim, half = d / 2, size = s.code_group;
  if (s.code == FP8) {
    for (int64_t i = 0; i < 2 * d; ++i) both[i] = from_fp8(from[i]);
    return;
  }
  const uint8_t* parts = from + (s.code == INT4 ? d : 2 * d);
  if (s.code == INT4) {
    for (int64_t part = 0; part < 2; ++part, from += half) {
      float* to = both + part * d;
      for (int64_t i = 0; i < half; ++i) to[i] = float(int32_t(from[i] & 15));
      for (int64_t i = 0; i < half; ++i) to[half + i] = float(int32_t(from[i] >> 4));
    }
  } else {
    for (int64_t i = 0; i < 2 * d; ++i) both[i] = float(int32_t(from[i]));
  }
  const int64_t groups = 2 * d / size;
  for (int64_t g = 0; g < groups; ++g) {
    bfloat16 offset_bits, step_bits;
    std::memcpy(&offset_bits, parts + 2 * g, 2);
    std::memcpy(&step_bits, parts + 2 * (groups + g), 2);
    const float offset = wide(offset_bits), step = wide(step_bits);
    float* to = both + g * size;
    for (int64_t i = 0; i < size; ++i) to[i] = offset + step * to[i];
  }
}
"""
