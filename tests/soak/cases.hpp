// SPDX-License-Identifier: MIT
/// \file
/// The kinds of cases.
#pragma once

#include "soak/check.hpp"
#include "support/random.hpp"

namespace soak {

void attention_case(Check& check, Random& random);
void layer_case(Check& check, Random& random);
void transformer_case(Check& check, Random& random);
void stream_case(Check& check, Random& random);
void encoder_case(Check& check, Random& random);
void training_case(Check& check, Random& random);

struct Kind {
  const char* name;
  void (*run)(Check& check, Random& random);
  /// Of ten cases, so many are of this kind.
  int share;
};

inline constexpr Kind kinds[] = {
    {"attention", attention_case, 3},     {"layer", layer_case, 2},
    {"transformer", transformer_case, 1}, {"stream", stream_case, 2},
    {"encoder", encoder_case, 1},         {"training", training_case, 1}};

}  // namespace soak
