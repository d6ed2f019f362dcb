// e^x = m * 2^n by n = rne(x / ln 2), t = x - n ln 2 (in two parts) and a polynomial of degree 5 for e^t on
// [-ln 2 / 2, ln 2 / 2]. Constants: Dukhan and Ablavatski, "Two-Pass Softmax Algorithm", 2020.
#pragma once

namespace fxquant {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kMinusLn2High = -0x1.62E43p-1f;
constexpr float kMinusLn2Low = 0x1.05C61p-29f;
constexpr float kC1 = 0x1.FFFFF6p-1f;
constexpr float kC2 = 0x1.FFFDC6p-2f;
constexpr float kC3 = 0x1.555A80p-3f;
constexpr float kC4 = 0x1.573A1Ap-5f;
constexpr float kC5 = 0x1.0F9F9Cp-7f;
// Adding it rounds to an integer n, and leaves n + 127, the exponent field of 2^n, in the lowest bits. Fast-math would
// fold it away.
constexpr float kMagic = 0x1.8000FEp23f;
// The same for eighths of n; e^t on [-ln 2 / 16, ln 2 / 16] is 1 + t + kEighth2 t^2 + kEighth3 t^3 to 2.7e-8.
constexpr float kMagicEighths = 0x1.8007F0p20f;
constexpr float kEighth2 = 0x1.0008AAp-1f;
constexpr float kEighth3 = 0x1.5548AAp-3f;

}  // namespace fxquant
