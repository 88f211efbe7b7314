// SPDX-License-Identifier: MIT
// Scalars of 16 bits, whose packets in Eigen lack what is needed, and one that has no packets.
#include "computations.hpp"

namespace {

using computations::Index;
using computations::Tensor;

// Scores of -20,000 are numbers in Eigen::half, near its least: equal ones weight values equally,
// in a sequence as for a single query.
int far_scores() {
  using Eigen::half;
  for (const Index n : {Index{1}, Index{40}}) {
    Tensor<half, 4> q(1, 1, n, 64), k(1, 1, n, 64), v(1, 1, n, 64);
    q.setConstant(half(-50.0F));
    k.setConstant(half(50.0F));
    v.setConstant(half(2.0F));
    const auto out = local_mha::LocalAttention<half>({.window_size = 64}).forward(q, k, v);
    for (Index i = 0; i < out.size(); ++i)
      if (std::abs(static_cast<float>(out.data()[i]) - 2.0F) > 5e-3F) {
        std::printf("half: far scores of %td rows give %g for 2\n", n,
                    static_cast<double>(static_cast<float>(out.data()[i])));
        return 1;
      }
  }
  return 0;
}

}  // namespace

int main() {
  return computations::check<Eigen::half>("half", 5e-3) |
         computations::check<Eigen::bfloat16>("bfloat16", 4e-2) |
         computations::check<long double>("long double", 1e-14) | far_scores();
}
