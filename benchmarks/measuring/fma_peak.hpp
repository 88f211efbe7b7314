// SPDX-License-Identifier: MIT
/// \file
/// The processor's limit: how many multiply-adds a core does when nothing else holds it up.
#pragma once

#include <algorithm>
#include <cstddef>
#include <vector>

#include <Eigen/Core>

#include "clock.hpp"

namespace measuring {

namespace detail {

#if defined(__clang__)
#define LOCAL_MHA_BENCHMARK_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define LOCAL_MHA_BENCHMARK_UNROLL _Pragma("GCC unroll 32")
#else
#define LOCAL_MHA_BENCHMARK_UNROLL
#endif

template <typename Scalar>
struct MultiplyAdds {
  using Packet = typename Eigen::internal::packet_traits<Scalar>::type;
  static constexpr int packet_size = Eigen::internal::unpacket_traits<Packet>::size;
  // Independent chains: more than the latency times the instructions a cycle, fewer than registers.
  static constexpr int chains = EIGEN_ARCH_DEFAULT_NUMBER_OF_REGISTERS >= 32 ? 24 : 12;

  /// `steps` times `x = x·factor + addend` in every lane of every chain. The numbers are not known
  /// to the compiler and every result is used, so nothing of it can be left out.
  /// \return the sum of all lanes
  static EIGEN_DONT_INLINE Scalar run(long steps, Scalar factor, Scalar addend) {
    using Eigen::internal::pmadd;
    using Eigen::internal::pset1;
    const Packet f = pset1<Packet>(factor);
    const Packet a = pset1<Packet>(addend);
    Packet x[chains];
    LOCAL_MHA_BENCHMARK_UNROLL for (int i = 0; i < chains; ++i) x[i] =
        pset1<Packet>(addend * static_cast<Scalar>(i));
    for (long step = 0; step < steps; ++step) {
      LOCAL_MHA_BENCHMARK_UNROLL for (int i = 0; i < chains; ++i) x[i] = pmadd(x[i], f, a);
    }
    Scalar sum = 0;
    LOCAL_MHA_BENCHMARK_UNROLL for (int i = 0; i < chains; ++i) sum +=
        Eigen::internal::predux(x[i]);
    return sum;
  }

  static constexpr double flops(long steps) {
    return 2.0 * packet_size * chains * static_cast<double>(steps);
  }
};

#undef LOCAL_MHA_BENCHMARK_UNROLL

}  // namespace detail

/// Floating-point operations a second of multiply-adds in registers, in the packets that the
/// library computes with, on this core now: the median of windows that are as long as what it is
/// compared with, so that what takes a virtual machine's core away for moments counts in both.
/// \param seconds how long to measure, three windows at least
/// \param window seconds of each, from half a millisecond on
template <typename Scalar>
double fma_peak(double seconds = 0.025, double window = 5e-4) {
  using Work = detail::MultiplyAdds<Scalar>;
  // Converges to 1: neither overflow nor denormals on the way.
  volatile Scalar factor = Scalar(0.75);
  volatile Scalar addend = Scalar(0.25);
  volatile Scalar used = 0;
  const auto timed = [&](long steps) {
    const double begin = cpu_seconds();
    used = Work::run(steps, factor, addend);
    return cpu_seconds() - begin;
  };
  long steps = 1024;
  double elapsed = timed(steps);
  for (; elapsed < 5e-4; elapsed = timed(steps)) steps *= 2;
  if (window > elapsed) steps = static_cast<long>(static_cast<double>(steps) * window / elapsed);
  std::vector<double> found;
  for (const double begin = cpu_seconds(); found.size() < 3 || cpu_seconds() - begin < seconds;) {
    const double spent = timed(steps);
    // A clock of a virtual machine may stand still.
    if (spent > 0) found.push_back(Work::flops(steps) / spent);
  }
  const auto middle = found.begin() + static_cast<std::ptrdiff_t>(found.size() / 2);
  std::nth_element(found.begin(), middle, found.end());
  return *middle;
}

}  // namespace measuring
