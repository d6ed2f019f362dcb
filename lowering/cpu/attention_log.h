// The C interface of attention with logarithmic codes of its weights. No torch headers.
#pragma once
#include "attention.h"

extern "C" {
enum { FXQUANT_LOG2 = 0, FXQUANT_LOG_SQRT2 = 1, FXQUANT_ADALOG = 2 };

// Static uniform codes of one operand: x is about scale (code - zero_point). Steps count elements of scale and zero_point;
// a step of 0 shares one.
typedef struct {
  const float *scale, *zero_point;  // scale null: the operand stays float32; zero_point null: codes are -top .. top
  int64_t head_step, channel_step;
  int32_t top;  // the greatest code
} fxquant_uniform_codes;

// Codes 0 .. codes - 1 of the weights, and one for zero.
typedef struct {
  const float *scale, *base;  // one a query head (step 1) or one for all (step 0); base: of AdaLog, a whole number
  int64_t head_step;
  int32_t family, width, codes;
} fxquant_log_codes;

typedef struct {
  fxquant_uniform_codes q, k, v;  // q and k both have codes or both have none; v has
  fxquant_log_codes p;
} fxquant_log_attention;

// What the kernel computed on its way, for tests. Each pointer may be null; all arrays are contiguous.
typedef struct {
  float *scores, *lse;  // [batch][heads][queries][keys] (keys that a row does not see are left alone), and without the keys
  int16_t* codes;       // as the scores
  float* sums;          // [planes][batch][heads][queries][value_depth], whole numbers
} fxquant_log_trace;

// How many planes the weights have (fxquant/reference/log_attention.py).
FXQUANT_EXPORT int64_t fxquant_attention_log_planes(const fxquant_attention_problem* problem,
                                                    const fxquant_log_attention* format);

// As fxquant_attention, on static codes of q, k and v and codes of the weights. trace may be null. Every bit of the result is
// the same for every instruction set where q and k have codes.
FXQUANT_EXPORT void fxquant_attention_log(const fxquant_attention_problem* problem, const fxquant_log_attention* format,
                                          const fxquant_log_trace* trace, int64_t workers, fxquant_parallel parallel,
                                          void* pool);
}
