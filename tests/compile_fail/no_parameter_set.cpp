// SPDX-License-Identifier: MIT
// A struct is a set of weights if it says which it has.
#include <local_mha/local_mha.hpp>

struct Weights {
  local_mha::RowMatrix<float> weight;
#ifdef CORRECTED
  static void visit_each(auto& set, auto&& visit) { visit("weight", set.weight); }
#endif
};

void zero(Weights& weights) { local_mha::set_zero(weights); }
